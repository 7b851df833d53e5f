//! Credentials: never more than the caller of mistctl has.

use anyhow::{Context, Result};

use crate::image::process::Creds;
use crate::kernel::remote::{Arg, Remote};
use crate::kernel::thread_status::ThreadStatus;

/// Our own.
pub fn ours() -> Result<Creds> {
    let status = ThreadStatus::read("/proc/self/status").context("reading our own credentials")?;
    Ok(status.creds)
}

fn capability_sets(effective: u64, permitted: u64, inheritable: u64) -> Vec<u8> {
    let mut b = Vec::with_capacity(24);
    for shift in [0, 32] {
        for set in [effective, permitted, inheritable] {
            b.extend(((set >> shift) as u32).to_le_bytes());
        }
    }
    b
}

/// Sets a thread's credentials. Bits that nobody here has are left out.
pub fn set(r: &mut Remote, c: &Creds, ours: &Creds) -> Result<()> {
    let privileged = ours.uids[0] == 0;
    if privileged {
        if c.groups != ours.groups {
            let groups: Vec<u8> = c.groups.iter().flat_map(|g| g.to_le_bytes()).collect();
            r.must(
                "groups",
                libc::SYS_setgroups,
                &[(c.groups.len() as u64).into(), Arg::In(&groups)],
            )?;
        }
        for cap in 0..64u64 {
            if ours.cap_bounding & !c.cap_bounding & (1 << cap) != 0 {
                r.must(
                    "bounding set",
                    libc::SYS_prctl,
                    &[libc::PR_CAPBSET_DROP.into(), cap.into()],
                )?;
            }
        }
    }
    // _LINUX_CAPABILITY_VERSION_3 for this thread.
    let mut header = 0x2008_0522u32.to_le_bytes().to_vec();
    header.extend(0u32.to_le_bytes());
    let ids = |v: &[u32; 4]| v.map(u64::from);
    if c.gids != ours.gids || c.uids != ours.uids {
        r.must(
            "keeping capabilities",
            libc::SYS_prctl,
            &[libc::PR_SET_KEEPCAPS.into(), 1u64.into()],
        )?;
        let g = ids(&c.gids);
        r.must(
            "group ids",
            libc::SYS_setresgid,
            &[g[0].into(), g[1].into(), g[2].into()],
        )?;
        let u = ids(&c.uids);
        r.must(
            "user ids",
            libc::SYS_setresuid,
            &[u[0].into(), u[1].into(), u[2].into()],
        )?;
        // Leaving user 0 has taken the capabilities out of effect that the next calls need.
        let raised = capability_sets(ours.cap_permitted, ours.cap_permitted, ours.cap_inheritable);
        r.must(
            "capabilities",
            libc::SYS_capset,
            &[Arg::In(&header), Arg::In(&raised)],
        )?;
        r.must("group id for files", libc::SYS_setfsgid, &[g[3].into()])?;
        r.must("user id for files", libc::SYS_setfsuid, &[u[3].into()])?;
    }
    let permitted = c.cap_permitted & ours.cap_permitted;
    let sets = capability_sets(
        c.cap_effective & permitted,
        permitted,
        c.cap_inheritable & ours.cap_permitted,
    );
    if privileged && c.securebits != ours.securebits {
        r.must(
            "securebits",
            libc::SYS_prctl,
            &[
                libc::PR_SET_SECUREBITS.into(),
                u64::from(c.securebits).into(),
            ],
        )?;
    }
    if (c.cap_effective, c.cap_permitted, c.cap_inheritable)
        != (ours.cap_effective, ours.cap_permitted, ours.cap_inheritable)
        || c.uids != ours.uids
    {
        r.must(
            "capabilities",
            libc::SYS_capset,
            &[Arg::In(&header), Arg::In(&sets)],
        )?;
    }
    for cap in (0..64u64).filter(|cap| c.cap_ambient & (1 << cap) != 0) {
        r.may(
            "ambient capabilities",
            libc::SYS_prctl,
            &[
                libc::PR_CAP_AMBIENT.into(),
                libc::PR_CAP_AMBIENT_RAISE.into(),
                cap.into(),
                0u64.into(),
                0u64.into(),
            ],
        )?;
    }
    if c.no_new_privs {
        r.must(
            "no_new_privs",
            libc::SYS_prctl,
            &[
                libc::PR_SET_NO_NEW_PRIVS.into(),
                1u64.into(),
                0u64.into(),
                0u64.into(),
                0u64.into(),
            ],
        )?;
    }
    Ok(())
}
