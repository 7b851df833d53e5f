#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use mistctl_fuzz::Fixture;

static FIXTURE: LazyLock<Fixture> = LazyLock::new(Fixture::default);

fuzz_target!(|data: &[u8]| FIXTURE.try_with("manifest.json", data));
