//! libpvm's own functions and variables, found when the first of them is needed.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::layout::{Frag, Pmsg, Tracer, Ttpcb};
use crate::state::{know, known};

type Str = *mut c_char;
type Ints = *mut c_int;
type Any = *mut c_void;
/// A callback of the program: message handler.
pub type Handler = Option<unsafe extern "C" fn(c_int) -> c_int>;
/// A callback of the program: decides whether a message matches.
pub type Match = Option<unsafe extern "C" fn(c_int, c_int, c_int) -> c_int>;

macro_rules! functions {
    ($($name:ident: fn($($arg:ty),*) $(-> $ret:ty)?;)*) => {
        /// libpvm's functions by name; none where this libpvm lacks one.
        #[repr(C, align(64))]
        pub struct Real {
            $(pub $name: Option<unsafe extern "C" fn($($arg),*) $(-> $ret)?>,)*
            /// libpvm's variables.
            pub var: Vars,
        }
        impl Real {
            /// Nothing of it.
            pub const NONE: Real = Real { $($name: None,)* var: Vars::NONE };

            fn find() -> Real {
                Real {
                    // SAFETY: the symbol, when there is one, is libpvm's function of that name, whose
                    // prototype is pvm3.h's or, for the internal ones, that of PVM 3.4's sources; a
                    // pointer to a function and a nullable one have the same representation.
                    $($name: unsafe {
                        std::mem::transmute::<Any, Option<unsafe extern "C" fn($($arg),*) $(-> $ret)?>>(
                            next(concat!(stringify!($name), "\0")))
                    },)*
                    var: Vars::find(),
                }
            }
        }
    };
}

functions! {
    // Those of every message, in a line of cache.
    mroute: fn(c_int, c_int, c_int, *mut libc::timeval) -> c_int;
    mesg_input: fn(*mut Pmsg) -> c_int;
    pvm_send: fn(c_int, c_int) -> c_int;
    pvm_recv: fn(c_int, c_int) -> c_int;
    pvm_psend: fn(c_int, c_int, Any, c_int, c_int) -> c_int;
    pvm_precv: fn(c_int, c_int, Any, c_int, c_int, Ints, Ints, Ints) -> c_int;
    pvm_nrecv: fn(c_int, c_int) -> c_int;
    pvm_trecv: fn(c_int, c_int, *mut libc::timeval) -> c_int;
    // The others.
    pvmmcast: fn(c_int, Ints, c_int, c_int) -> c_int;
    msendrecv: fn(c_int, c_int, c_int) -> c_int;
    pvmbeatask: fn() -> c_int;
    pvmreset: fn(c_int, c_int, Str, c_int) -> c_int;
    pvm_tc_siblings: fn(c_int) -> c_int;
    umbuf_free: fn(*mut Pmsg);
    umbuf_new: fn() -> *mut Pmsg;
    pmsg_setenc: fn(*mut Pmsg, c_int) -> c_int;
    fr_new: fn(c_int) -> *mut Frag;
    fr_unref: fn(*mut Frag);
    ttpcb_new: fn() -> *mut Ttpcb;
    ttpcb_find: fn(c_int) -> *mut Ttpcb;
    ttpcb_dead: fn(*mut Ttpcb);
    ttpcb_delete: fn(*mut Ttpcb);
    midtobuf: fn(c_int) -> *mut Pmsg;
    pvm_mkbuf: fn(c_int) -> c_int;
    pvm_freebuf: fn(c_int) -> c_int;
    pvm_setsbuf: fn(c_int) -> c_int;
    pvm_pkint: fn(Ints, c_int, c_int) -> c_int;
    pvm_pkstr: fn(Str) -> c_int;
    pvm_bufinfo: fn(c_int, Ints, Ints, Ints) -> c_int;
    pvm_version: fn() -> *const c_char;
    pvm_perror: fn(Str) -> c_int;
    pvm_addhosts: fn(*mut Str, c_int, Ints) -> c_int;
    pvm_addmhf: fn(c_int, c_int, c_int, Handler) -> c_int;
    pvm_archcode: fn(Str) -> c_int;
    pvm_catchout: fn(Any) -> c_int;
    pvm_config: fn(Ints, Ints, Any) -> c_int;
    pvm_delete: fn(Str, c_int) -> c_int;
    pvm_delhosts: fn(*mut Str, c_int, Ints) -> c_int;
    pvm_delinfo: fn(Str, c_int, c_int) -> c_int;
    pvm_delmhf: fn(c_int) -> c_int;
    pvm_exit: fn() -> c_int;
    pvm_freecontext: fn(c_int) -> c_int;
    pvm_getfds: fn(*mut Ints) -> c_int;
    pvm_getmboxinfo: fn(Str, Ints, *mut *mut MboxInfo) -> c_int;
    pvm_getnoresets: fn(*mut Ints, Ints) -> c_int;
    pvm_getopt: fn(c_int) -> c_int;
    pvm_halt: fn() -> c_int;
    pvm_hostsync: fn(c_int, Any, Any) -> c_int;
    pvm_insert: fn(Str, c_int, c_int) -> c_int;
    pvm_kill: fn(c_int) -> c_int;
    pvm_lookup: fn(Str, c_int, Ints) -> c_int;
    pvm_mcast: fn(Ints, c_int, c_int) -> c_int;
    pvm_mstat: fn(Str) -> c_int;
    pvm_mytid: fn() -> c_int;
    pvm_newcontext: fn() -> c_int;
    pvm_notify: fn(c_int, c_int, c_int, Ints) -> c_int;
    pvm_parent: fn() -> c_int;
    pvm_probe: fn(c_int, c_int) -> c_int;
    pvm_pstat: fn(c_int) -> c_int;
    pvm_putinfo: fn(Str, c_int, c_int) -> c_int;
    pvm_recvf: fn(Match) -> Match;
    pvm_recvinfo: fn(Str, c_int, c_int) -> c_int;
    pvm_reg_hoster: fn() -> c_int;
    pvm_reg_rm: fn(Any) -> c_int;
    pvm_reg_tasker: fn() -> c_int;
    pvm_reg_tracer: fn(c_int, c_int, c_int, c_int, Str, c_int, c_int) -> c_int;
    pvm_sendsig: fn(c_int, c_int) -> c_int;
    pvm_setopt: fn(c_int, c_int) -> c_int;
    pvm_siblings: fn(*mut Ints) -> c_int;
    pvm_spawn: fn(Str, *mut Str, c_int, Str, c_int, Ints) -> c_int;
    pvm_start_pvmd: fn(c_int, *mut Str, c_int) -> c_int;
    pvm_tasks: fn(c_int, Ints, *mut *mut TaskInfo) -> c_int;
    pvm_tickle: fn(c_int, Ints, Ints, Ints) -> c_int;
}

/// `struct pvmtaskinfo`
#[repr(C)]
#[derive(Clone, Copy)]
pub struct TaskInfo {
    pub tid: c_int,
    pub ptid: c_int,
    pub host: c_int,
    pub flag: c_int,
    pub a_out: Str,
    pub pid: c_int,
}

/// `struct pvmmboxinfo`
#[repr(C)]
pub struct MboxInfo {
    name: Str,
    pub entries: c_int,
    indices: Ints,
    pub owners: Ints,
    pub flags: Ints,
}

macro_rules! variables {
    ($($name:ident: $type:ty,)*) => {
        /// Addresses of libpvm's variables; null where this libpvm lacks one.
        pub struct Vars {
            $(pub $name: *mut $type,)*
        }
        impl Vars {
            const NONE: Vars = Vars { $($name: ptr::null_mut(),)* };

            fn find() -> Vars {
                Vars { $($name: global(concat!(stringify!($name), "\0")).cast(),)* }
            }
            /// Tells mistctl where they are.
            pub fn publish(&self, globals: &pvm_abi::block::Globals) {
                $(globals.$name.store(self.$name as u64, Ordering::SeqCst);)*
            }
        }
    };
}

variables! {
    pvmmytid: c_int,
    pvmmyptid: c_int,
    pvmmyupid: c_int,
    pvmrxlist: *mut Pmsg,
    pvmrbuf: *mut Pmsg,
    pvmsbuf: *mut Pmsg,
    pvmmidh: c_void,
    pvmmidhsiz: c_int,
    pvmmyctx: c_int,
    pvmudpmtu: c_int,
    pvmfrgsiz: c_int,
    pvmschedtid: c_int,
    pvmrouteopt: c_int,
    pvmtrc: Tracer,
    pvmctrc: Tracer,
    pvmnsibs: c_int,
    pvmsibtids: *mut c_int,
    pvmnoreset: c_int,
    pvmnoresetindex: c_int,
    waitlist: c_void,
}

/// The function that would be called without this library.
fn next(name: &str) -> Any {
    // SAFETY: `name` ends in NUL. RTLD_NEXT looks behind this library in the order the program was
    // linked; a libpvm that was loaded later, privately, is asked for by its name.
    unsafe {
        let found = libc::dlsym(libc::RTLD_NEXT, name.as_ptr().cast());
        if !found.is_null() {
            return found;
        }
        let library = libc::dlopen(
            c"libpvm3.so.3".as_ptr(),
            libc::RTLD_LAZY | libc::RTLD_NOLOAD,
        );
        if library.is_null() {
            ptr::null_mut()
        } else {
            libc::dlsym(library, name.as_ptr().cast())
        }
    }
}

/// The variable that libpvm and the program share (the program's own copy, where it has one).
fn global(name: &str) -> Any {
    // SAFETY: `name` ends in NUL.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr().cast()) };
    if found.is_null() { next(name) } else { found }
}

static LOOKED: AtomicBool = AtomicBool::new(false);

/// libpvm, or none when there is none to be found.
#[inline]
pub fn real() -> Option<&'static Real> {
    let real = known();
    // One that is of no use is not kept.
    if real.mroute.is_some() {
        Some(real)
    } else {
        resolve()
    }
}

#[cold]
#[inline(never)]
fn resolve() -> Option<&'static Real> {
    if LOOKED.swap(true, Ordering::SeqCst) {
        return None;
    }
    let _errno = Errno::keep();
    let real = Real::find();
    if real.mroute.is_none() || real.mesg_input.is_none() || real.var.pvmmytid.is_null() {
        return None;
    }
    know(real);
    crate::inside::begin();
    Some(known())
}

/// Puts errno back when dropped.
pub struct Errno(c_int);

impl Errno {
    /// Remembers errno.
    pub fn keep() -> Errno {
        // SAFETY: the location is this thread's errno, always valid.
        Errno(unsafe { *libc::__errno_location() })
    }
}

impl Drop for Errno {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe { *libc::__errno_location() = self.0 };
    }
}

/// Writes one line to stderr, as libpvm's own messages go there.
pub fn complain(line: &str) {
    let _errno = Errno::keep();
    let text = format!("mist: [pid {}] {line}\n", std::process::id());
    // SAFETY: the buffer is valid for its length.
    unsafe { libc::write(2, text.as_ptr().cast(), text.len()) };
}

/// A C string as text, for messages.
pub fn text(string: *const c_char) -> String {
    if string.is_null() {
        return String::new();
    }
    // SAFETY: callers pass strings libpvm made.
    unsafe { CStr::from_ptr(string) }
        .to_string_lossy()
        .into_owned()
}
