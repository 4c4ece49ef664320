//! Whatever is written, the answer is a configuration or a list of problems.

mod host;

use std::fs;

use caisson_config_service::resolve::Resolver;
use host::Host;

const ROUNDS: usize = 4000;
const PIECES: [&str; 38] = [
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
    "qemu",
    "clh",
    "cloud-hypervisor",
    "runtime",
    "agent",
    "default_vcpus",
    "kernel",
    "shared_fs",
    "initrd",
    "virtio_fs_extra_args",
    "log_level",
    "true",
    "-1",
    "0x7fffffffffffffff",
    "1e999",
    "1979-05-27T07:32:00Z",
    "nan",
    " ",
];

/// A small generator, so that a failing round can be repeated (xorshift64, Marsaglia 2003).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

/// Resolves what `make` writes, many times; a panic fails the test with the text in sight.
async fn resolve_many(seed: u64, mut make: impl FnMut(&mut Random) -> Vec<u8>) {
    let host = Host::new();
    let file = host.configure("");
    let mut resolver = Resolver::new(host.installation());
    let mut random = Random(seed);
    for _ in 0..ROUNDS {
        let text = make(&mut random);
        fs::write(&file, &text).unwrap();
        if let Err(problems) = resolver.resolve(Some(&file)).await {
            assert!(!problems.sentences().is_empty(), "{}", String::from_utf8_lossy(&text));
        }
    }
}

#[tokio::test]
async fn a_good_file_with_changed_bytes_never_panics() {
    let good = include_bytes!("../defaults/configuration-qemu.toml").to_vec();
    resolve_many(0x5eed_0001, |random| {
        let mut text = good.clone();
        for _ in 0..=random.below(20) {
            let at = random.below(text.len());
            match random.below(3) {
                0 => text[at] = random.below(256) as u8,
                1 => drop(text.remove(at)),
                _ => drop(text.splice(at..at, PIECES[random.below(PIECES.len())].bytes())),
            }
        }
        text
    })
    .await;
}

#[tokio::test]
async fn any_row_of_pieces_never_panics() {
    resolve_many(0x5eed_0002, |random| {
        (0..random.below(80)).flat_map(|_| PIECES[random.below(PIECES.len())].bytes()).collect()
    })
    .await;
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
