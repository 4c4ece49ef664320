//! Whatever is written, the answer is a configuration or a list of problems, each one line long.

mod host;

use std::fs;

use caisson_config_service::resolve::problems_in;
use host::Host;
use proptest::{collection::vec, prelude::*, sample::select};

const GOOD: &str = include_str!("../defaults/configuration-qemu.toml");
const PIECES: [&str; 44] = [
    "[",
    "]",
    "[[",
    "]]",
    "{",
    "}",
    "=",
    ".",
    ",",
    "\n",
    "\"",
    "'",
    "\"\"\"",
    "#",
    "\\",
    "\\u0000",
    "\u{feff}",
    "ä",
    "\0",
    "hypervisor",
    "[hypervisor.qemu]\n",
    "[runtime]\n",
    "qemu",
    "clh",
    "cloud-hypervisor",
    "agent",
    "default_vcpus",
    "kernel",
    "shared_fs",
    "initrd",
    "rootfs",
    "virtio_fs_extra_args",
    "enable_annotations",
    "valid_kernel_paths",
    "log_level",
    "[\"*\"]",
    "[ab",
    "true",
    "-1",
    "0x7fffffffffffffff",
    "1e999",
    "1979-05-27T07:32:00Z",
    "nan",
    " ",
];

fn pieces(most: usize) -> impl Strategy<Value = String> {
    vec(
        prop_oneof![3 => select(&PIECES[..]).prop_map(str::to_owned), 1 => any::<char>().prop_map(String::from)],
        0..most,
    )
    .prop_map(|pieces| pieces.concat())
}

/// The shipped file with pieces put in, and others taken out.
fn edited() -> impl Strategy<Value = String> {
    let edit = (0..GOOD.len(), 0..40_usize, pieces(3));
    vec(edit, 1..12).prop_map(|edits| {
        edits.into_iter().fold(GOOD.to_owned(), |mut text, (at, removed, put)| {
            let start = text.floor_char_boundary(at.min(text.len()));
            let end = text.ceil_char_boundary((start + removed).min(text.len()));
            text.replace_range(start..end, &put);
            text
        })
    })
}

fn annotation() -> impl Strategy<Value = (String, String)> {
    let prefix = select(&["io.caisson.config.", "io.katacontainers.config.", "io.kubernetes.cri.sandbox-"][..]);
    let name = select(
        &["hypervisor.kernel", "hypervisor.default_vcpus", "runtime.hypervisor", "agent.x", "memory", "cpu-quota", ""]
            [..],
    );
    (prefix, name, pieces(4), pieces(6))
        .prop_map(|(prefix, name, more, value)| (format!("{prefix}{name}{more}"), value))
}

fn assert_answered(told: &[String]) -> Result<(), TestCaseError> {
    prop_assert!(told.iter().all(|sentence| !sentence.is_empty() && !sentence.contains('\n')), "{told:?}");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_row_of_pieces_is_answered(text in pieces(80)) {
        assert_answered(&problems_in(&text, &[].into()))?;
    }

    #[test]
    fn a_good_file_with_any_edits_is_answered(text in edited()) {
        assert_answered(&problems_in(&text, &[].into()))?;
    }

    #[test]
    fn any_annotations_are_answered(annotations in vec(annotation(), 0..5), list in pieces(4)) {
        let text = format!("[hypervisor.qemu]\nenable_annotations = [\"*\", \"*.*\"]\nvalid_kernel_paths = [{list:?}]");
        assert_answered(&problems_in(&text, &annotations.into_iter().collect()))?;
    }
}

#[tokio::test]
async fn endless_nesting_is_refused() {
    let host = Host::new();
    let file = host.configure("");
    for text in [
        "a.".repeat(100_000),
        format!("[{}a]", "a.".repeat(100_000)),
        format!("a={}", "[".repeat(100_000)),
        format!("a={}", "{a=".repeat(100_000)),
        format!("a={}", format!("{{{}a=", "a.".repeat(70)).repeat(2_000)),
    ] {
        fs::write(&file, text).unwrap();
        assert!(host.resolve().await.is_err());
    }
}

#[tokio::test]
async fn a_file_full_of_mistakes_gets_a_short_answer() {
    let host = Host::new();
    let lines: String = (0..40_000).map(|number| format!("unknown_{number} = 1\n")).collect();
    host.configure(&lines);
    let told = host.resolve().await.unwrap_err();
    assert_eq!((told.len(), told[100].as_str()), (101, "and 39900 more"));
}

#[tokio::test]
async fn a_huge_file_is_not_read() {
    let host = Host::new();
    host.configure(&"#".repeat(1 << 20));
    assert_eq!(host.resolve().await.unwrap_err(), ["read DIR/etc/configuration.toml: longer than 1 MiB"]);
}
