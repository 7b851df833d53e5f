//! The block a task under the shim publishes, read from outside with process_vm_readv.
//!
//! The shim is its only writer, but for the fields marked "from outside". All fields are written with
//! single stores, so a reader sees each of them whole; a reader that needs several to agree stops the
//! task first, or reads twice.

use std::sync::atomic::{AtomicI32, AtomicU8, AtomicU32, AtomicU64};

/// First eight bytes of a block.
pub const MAGIC: [u8; 8] = *b"MISTSHIM";
/// Layout that this file describes.
pub const VERSION: u32 = 2;
/// Markers that can be asked for at the same time.
pub const MARKERS: usize = 8;
/// Sends that are listed one by one; more set [`Block::sending_more`].
pub const SENDING: usize = 16;
/// Words of [`Block::hold_hosts`]: a bit per host index.
pub const HOST_WORDS: usize = 64;
/// Longest path of a table, with its NUL.
pub const PATH_LEN: usize = 256;

/// Values of [`Block::state`].
pub mod state {
    /// Not enrolled (never called PVM, or left it).
    pub const IDLE: u32 = 0;
    /// Enrolled; V, R and the globals are valid.
    pub const ENROLLED: u32 = 1;
    /// libpvm is not one whose layout the shim knows; it stands aside for good.
    pub const UNKNOWN_LIBPVM: u32 = 2;
}

/// Bits of [`Block::flags`].
pub mod flag {
    /// The task registered as resource manager.
    pub const RESOURCE_MANAGER: u32 = 1;
    /// The task registered as hoster.
    pub const HOSTER: u32 = 2;
    /// The task registered as tasker.
    pub const TASKER: u32 = 4;
    /// The task registered as tracer.
    pub const TRACER: u32 = 8;
    /// The program installed its own pvm_recvf.
    pub const RECVF: u32 = 16;
    /// The tid pvmd gave is another task's V: this task needs a V of its own before anybody hears of it.
    pub const TID_TAKEN: u32 = 32;
    /// The table could not be mapped; the task takes part in no move.
    pub const NO_TABLE: u32 = 64;
    /// MIST_DIRECT_ROUTES=1: direct routes are let through; such a task is not moved.
    pub const DIRECT_ROUTES: u32 = 128;
    /// The task collects output (pvm_catchout or PvmOutputTid).
    pub const COLLECTOR: u32 = 256;
    /// The task set PvmNoReset.
    pub const NO_RESET: u32 = 512;
}

/// Values of [`Block::wait`].
pub mod wait {
    /// Not in libpvm's message loop.
    pub const NONE: u32 = 0;
    /// Waits for messages, as long as it takes or until a time-out.
    pub const RECEIVE: u32 = 1;
    /// Looks for messages without waiting.
    pub const POLL: u32 = 2;
    /// Sends.
    pub const SEND: u32 = 3;
    /// Waits at a gate, reading on; nothing of the message has been written.
    pub const GATE: u32 = 4;
    /// Waits at a gate inside a message handler, without reading on.
    pub const GATE_DEAF: u32 = 5;
}

/// Values of [`Block::call`]: the libpvm call the program made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[allow(missing_docs)]
pub enum Call {
    None,
    Addhosts,
    Addmhf,
    Archcode,
    Bufinfo,
    Catchout,
    Config,
    Delete,
    Delhosts,
    Delinfo,
    Delmhf,
    Exit,
    Freecontext,
    Getfds,
    Getmboxinfo,
    Getnoresets,
    Getopt,
    Halt,
    Hostsync,
    Insert,
    Kill,
    Lookup,
    Mcast,
    Mstat,
    Mytid,
    Newcontext,
    Notify,
    Nrecv,
    Parent,
    Perror,
    Precv,
    Probe,
    Psend,
    Pstat,
    Putinfo,
    Recv,
    Recvf,
    Recvinfo,
    RegHoster,
    RegRm,
    RegTasker,
    RegTracer,
    Send,
    Sendsig,
    Setopt,
    Siblings,
    Spawn,
    StartPvmd,
    Tasks,
    Tickle,
    Trecv,
    Reset,
    Enrol,
    Internal,
}

/// Addresses, in the task, of libpvm's exported variables; 0 when it has none of that name.
#[repr(C)]
#[derive(Default)]
#[allow(missing_docs)]
pub struct Globals {
    pub pvmmytid: AtomicU64,
    pub pvmmyptid: AtomicU64,
    pub pvmmyupid: AtomicU64,
    pub pvmrxlist: AtomicU64,
    pub pvmrbuf: AtomicU64,
    pub pvmsbuf: AtomicU64,
    pub pvmmidh: AtomicU64,
    pub pvmmidhsiz: AtomicU64,
    pub pvmmyctx: AtomicU64,
    pub pvmudpmtu: AtomicU64,
    pub pvmfrgsiz: AtomicU64,
    pub pvmschedtid: AtomicU64,
    pub pvmrouteopt: AtomicU64,
    pub pvmtrc: AtomicU64,
    pub pvmctrc: AtomicU64,
    pub pvmnsibs: AtomicU64,
    pub pvmsibtids: AtomicU64,
    pub pvmnoreset: AtomicU64,
    pub pvmnoresetindex: AtomicU64,
    pub waitlist: AtomicU64,
}

/// The block. What every message touches comes first, in two lines of cache.
#[repr(C)]
pub struct Block {
    /// [`MAGIC`]
    pub magic: [u8; 8],
    /// [`VERSION`]
    pub version: u32,
    /// Bytes of this struct.
    pub size: u32,
    /// See [`state`].
    pub state: AtomicU32,
    /// Not 0 inside libpvm: calls of the program, of its callbacks, and some of libpvm itself, that are on the stack.
    pub depth: AtomicU32,
    /// The virtual tid.
    pub v: AtomicU32,
    /// The real tid. From outside: set when a new incarnation takes over.
    pub r: AtomicU32,
    /// See [`Call`]; the call at the bottom of the stack.
    pub call: AtomicU32,
    /// Flags argument of that call, where it has one (pvm_recvinfo); else 0.
    pub call_flags: AtomicI32,
    /// See [`wait`].
    pub wait: AtomicU32,
    /// Not 0 while the task waits for an answer of its pvmd.
    pub asking: AtomicU32,
    /// Messages on their way out: number of used words of `sending`.
    pub sending_count: AtomicU32,
    /// Not 0: more destinations than `sending` holds, or a multicast; take it as "to everybody".
    pub sending_more: AtomicU32,
    /// Stack pointer of the call at the bottom.
    pub stack: AtomicU64,
    /// Generation of the table that was last acted upon. From outside: set to all ones when a new
    /// incarnation takes over, so that it looks at everything again.
    pub seen: AtomicU64,
    /// From outside: set to 1 after `marker_asked` was changed; the shim clears it when it looks.
    pub attention: AtomicU32,
    /// From outside: not 0 makes sends to the hosts in `hold_hosts` wait.
    pub hold_any: AtomicU32,
    /// Exit notices and output ends that are kept back because their task is moving.
    pub held: AtomicU32,
    /// Notify requests of the program that have not been answered yet.
    pub notifies: AtomicU32,
    /// Callbacks of the program (message handlers, pvm_recvf) on the stack.
    pub callbacks: AtomicU32,
    /// See [`flag`].
    pub flags: AtomicU32,
    /// Destinations (V, or R for messages of libpvm's own) of messages on their way out.
    pub sending: [AtomicU32; SENDING],
    /// Process that enrolled. A block whose pid is another one was inherited over fork.
    pub pid: AtomicU32,
    /// What the program asked for with PvmRoute; libpvm itself routes through pvmd.
    pub route: AtomicI32,
    /// From outside: markers asked for. Low 32 bits the tid (R) it goes to, high 32 bits a number;
    /// 0 none.
    pub marker_asked: [AtomicU64; MARKERS],
    /// The asked word, once the marker has been given to the pvmd socket behind everything before it.
    pub marker_done: [AtomicU64; MARKERS],
    /// From outside: bit per host index.
    pub hold_hosts: [AtomicU64; HOST_WORDS],
    /// Address of the mapped table, 0 without one.
    pub table: AtomicU64,
    /// Length of that mapping.
    pub table_len: AtomicU64,
    /// Path of the table's file.
    pub table_path: [AtomicU8; PATH_LEN],
    /// See [`Globals`].
    pub globals: Globals,
}

impl Block {
    /// A block that says nothing yet.
    pub const fn new() -> Block {
        Block {
            magic: MAGIC,
            version: VERSION,
            size: size_of::<Block>() as u32,
            state: AtomicU32::new(state::IDLE),
            depth: AtomicU32::new(0),
            v: AtomicU32::new(0),
            r: AtomicU32::new(0),
            call: AtomicU32::new(0),
            call_flags: AtomicI32::new(0),
            wait: AtomicU32::new(0),
            asking: AtomicU32::new(0),
            sending_count: AtomicU32::new(0),
            sending_more: AtomicU32::new(0),
            stack: AtomicU64::new(0),
            seen: AtomicU64::new(0),
            attention: AtomicU32::new(0),
            hold_any: AtomicU32::new(0),
            held: AtomicU32::new(0),
            notifies: AtomicU32::new(0),
            callbacks: AtomicU32::new(0),
            flags: AtomicU32::new(0),
            sending: [const { AtomicU32::new(0) }; SENDING],
            pid: AtomicU32::new(0),
            route: AtomicI32::new(0),
            marker_asked: [const { AtomicU64::new(0) }; MARKERS],
            marker_done: [const { AtomicU64::new(0) }; MARKERS],
            hold_hosts: [const { AtomicU64::new(0) }; HOST_WORDS],
            table: AtomicU64::new(0),
            table_len: AtomicU64::new(0),
            table_path: [const { AtomicU8::new(0) }; PATH_LEN],
            globals: Globals {
                pvmmytid: AtomicU64::new(0),
                pvmmyptid: AtomicU64::new(0),
                pvmmyupid: AtomicU64::new(0),
                pvmrxlist: AtomicU64::new(0),
                pvmrbuf: AtomicU64::new(0),
                pvmsbuf: AtomicU64::new(0),
                pvmmidh: AtomicU64::new(0),
                pvmmidhsiz: AtomicU64::new(0),
                pvmmyctx: AtomicU64::new(0),
                pvmudpmtu: AtomicU64::new(0),
                pvmfrgsiz: AtomicU64::new(0),
                pvmschedtid: AtomicU64::new(0),
                pvmrouteopt: AtomicU64::new(0),
                pvmtrc: AtomicU64::new(0),
                pvmctrc: AtomicU64::new(0),
                pvmnsibs: AtomicU64::new(0),
                pvmsibtids: AtomicU64::new(0),
                pvmnoreset: AtomicU64::new(0),
                pvmnoresetindex: AtomicU64::new(0),
                waitlist: AtomicU64::new(0),
            },
        }
    }
}

impl Default for Block {
    fn default() -> Block {
        Block::new()
    }
}
