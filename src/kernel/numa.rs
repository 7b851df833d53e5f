//! On which nodes memory is to be (numa(7)).

use std::sync::OnceLock;

/// Words of a mask that has a bit for each node there may be; None where the kernel knows no nodes.
pub fn mask_words() -> Option<usize> {
    static WORDS: OnceLock<Option<usize>> = OnceLock::new();
    *WORDS.get_or_init(|| {
        let text = std::fs::read_to_string("/sys/devices/system/node/possible").ok()?;
        words(text.trim())
    })
}

/// From a list of nodes like "0-3".
fn words(text: &str) -> Option<usize> {
    const MOST: usize = 1 << 16;
    let last: usize = text.rsplit([',', '-']).next()?.parse().ok()?;
    Some(last.min(MOST) / 64 + 1)
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_mask_has_room_for_the_last_node() {
        assert_eq!(super::words("0"), Some(1));
        assert_eq!(super::words("0-1,63"), Some(1));
        assert_eq!(super::words("0-64"), Some(2));
        assert_eq!(super::words(""), None);
    }
}
