//! The environment in which the caller started mistctl, for what it starts in turn.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use anyhow::Context;

/// All variables as the caller gave them.
///
/// Not `std::env::vars_os`: ld.so(8) takes LD_LIBRARY_PATH, LD_PRELOAD, TMPDIR and others away from a program with
/// file capabilities, and whoever has mistctl start a program wants that to have them. The strings as the kernel laid
/// them out are still there.
///
/// # Errors
/// When /proc cannot be read.
pub fn callers() -> anyhow::Result<Vec<(OsString, OsString)>> {
    let bytes = std::fs::read("/proc/self/environ")
        .context("cannot read /proc/self/environ, the environment mistctl was started in")?;
    Ok(parse(&bytes))
}

/// The value of a variable, if it is set.
pub fn value<'v>(variables: &'v [(OsString, OsString)], name: &str) -> Option<&'v OsStr> {
    let found = variables.iter().find(|(key, _)| key == name);
    found.map(|(_, value)| value.as_os_str())
}

/// Strings that end in NUL; those without `=` are no variables.
fn parse(bytes: &[u8]) -> Vec<(OsString, OsString)> {
    let split = |line: &[u8]| {
        // A name may begin with `=`, as in std.
        let at = line.iter().skip(1).position(|b| *b == b'=')? + 1;
        let (name, value) = line.split_at_checked(at)?;
        let value = OsStr::from_bytes(value.get(1..)?);
        Some((OsString::from_vec(name.to_vec()), value.to_owned()))
    };
    bytes.split(|b| *b == 0).filter_map(split).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_told_apart() {
        let found = parse(b"A=1\0B=\0C=x=y\0none\0=D=2\0\0");
        let expected = [("A", "1"), ("B", ""), ("C", "x=y"), ("=D", "2")];
        assert_eq!(found, expected.map(|(k, v)| (k.into(), v.into())));
        assert_eq!(value(&found, "C"), Some(OsStr::new("x=y")));
        assert_eq!(value(&found, "none"), None);
    }
}
