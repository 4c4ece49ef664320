//! What the built-in VMM tells of its options is what its shipped configuration was written from.

#[path = "../../tests/told/mod.rs"]
mod told;

use std::path::Path;

#[test]
fn what_it_tells_is_checked_in() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap();
    told::compare(Path::new(env!("CARGO_BIN_EXE_caisson-vmm-builtin")), "builtin", workspace);
}
