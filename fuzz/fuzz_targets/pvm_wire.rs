#![no_main]

use libfuzzer_sys::fuzz_target;

// The first byte says in pieces of which size the others arrive.
fuzz_target!(|data: &[u8]| {
    if let Some((piece, bytes)) = data.split_first() {
        mistctl::pvm::wire::digest(bytes, usize::from(*piece));
    }
});
