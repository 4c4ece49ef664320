//! A configuration's text, then a line with `annotation=value`, then more of these: never a panic, never an empty answer.
#![no_main]

use caisson_config_service::resolve::problems_in;
use libfuzzer_sys::fuzz_target;

/// Parts the text from the annotations.
const MARK: &str = "\n===\n";

fuzz_target!(|input: &str| {
    let (text, annotations) = input.split_once(MARK).unwrap_or((input, ""));
    let annotations = annotations.lines().filter_map(|line| line.split_once('='));
    let annotations = annotations.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    let told = problems_in(text, &annotations);
    assert!(told.iter().all(|sentence| !sentence.is_empty() && !sentence.contains('\n')), "{told:?}");
});
