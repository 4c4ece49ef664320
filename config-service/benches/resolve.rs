//! How long a shim waits for its configuration, and what the service holds in memory meanwhile.
//!
//! `cargo bench -p caisson-config-service --bench resolve [-- --json]`: the largest shipped configuration with twenty
//! drop-ins, asked for over the service's socket, with a connection for each call as shims make it. `cpu` is what the
//! service itself computes for one call, which a busy machine does not lengthen.

#[path = "../tests/host/mod.rs"]
mod host;

use std::{
    env, fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use caisson_config_service::{client::ConfigService, defaults};
use caisson_protocol::listen;
use host::{Host, ask};

const DROP_INS: usize = 20;
const CALLS: usize = 1000;
const CHANGES: usize = 200;
const AT_ONCE: usize = 200;
/// The median of a call when no file has changed, and when one has.
const LIMIT_MS: f64 = 2.0;
const LIMIT_MB: f64 = 5.0;

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let host = Host::new();
    // As a host's /run is, where the service keeps what was last good.
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    fs::remove_dir(host.path("run")).unwrap();
    symlink(memory.path(), host.path("run")).unwrap();
    let file = largest_configuration(&host);
    for number in 0..DROP_INS {
        host.write(&drop_in(number), &settings(number, 0));
    }
    let (service, mut process) = start(&host);

    let first = timed(&service, &file).await;
    let before = cpu_ms(process.id());
    let unchanged = median(times(CALLS, async |_| timed(&service, &file).await).await);
    let unchanged_cpu = (cpu_ms(process.id()) - before) / CALLS as f64;
    let before = cpu_ms(process.id());
    let changed = times(CHANGES, async |round| {
        host.write(&drop_in(round % DROP_INS), &settings(round % DROP_INS, round));
        timed(&service, &file).await
    });
    let changed = median(changed.await);
    let changed_cpu = (cpu_ms(process.id()) - before) / CHANGES as f64;
    let begun = Instant::now();
    let calls: Vec<_> = (0..AT_ONCE)
        .map(|_| {
            let (service, file) = (service.clone(), file.clone());
            tokio::spawn(async move { ask(&service, &file).await.unwrap() })
        })
        .collect();
    for call in calls {
        call.await.unwrap();
    }
    let at_once = begun.elapsed();
    let crowd_pss_mb = pss_kib(process.id()) / 1024.0;
    // The answers to these come after the service has seen that the crowd has gone.
    times(10, async |_| timed(&service, &file).await).await;
    let pss_mb = pss_kib(process.id()) / 1024.0;
    process.kill().unwrap();
    process.wait().unwrap();

    let rows = [
        ("resolve_first_ms", ms(first), None),
        ("resolve_unchanged_ms", ms(unchanged), Some(LIMIT_MS)),
        ("resolve_unchanged_cpu_ms", unchanged_cpu, None),
        ("resolve_changed_ms", ms(changed), Some(LIMIT_MS)),
        ("resolve_changed_cpu_ms", changed_cpu, None),
        ("resolve_200_at_once_ms", ms(at_once), None),
        ("service_with_200_pss_mb", crowd_pss_mb, None),
        ("service_pss_mb", pss_mb, Some(LIMIT_MB)),
    ];
    if env::args().any(|argument| argument == "--json") {
        let values: serde_json::Map<_, _> =
            rows.iter().map(|(name, value, _)| ((*name).into(), (*value).into())).collect();
        println!("{}", serde_json::Value::Object(values));
    } else {
        rows.iter().for_each(|(name, value, limit)| println!("{name:24} {value:8.2}{}", verdict(*value, *limit)));
    }
}

fn verdict(value: f64, limit: Option<f64>) -> String {
    limit
        .map_or_else(String::new, |limit| format!("  limit {limit}: {}", if value <= limit { "met" } else { "missed" }))
}

/// The longest of the shipped files, with this host's paths.
fn largest_configuration(host: &Host) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("defaults/options");
    let of = |hypervisor| fs::read_to_string(source.join(format!("{hypervisor}.json"))).unwrap();
    let text = |hypervisor| {
        defaults::text(hypervisor, &serde_json::from_str::<Vec<_>>(&of(hypervisor)).unwrap(), Path::new("/usr"))
    };
    let hypervisor = defaults::FILES.iter().map(|file| file.hypervisor).max_by_key(|name| text(name).len()).unwrap();
    host.launcher(hypervisor, &host.text(&of(hypervisor).replace("/usr/bin/", "DIR/bin/")));
    for program in ["qemu-system-x86_64", "cloud-hypervisor", "firecracker", "stratovirt", "acrn-dm", "iasl"] {
        host.program(&format!("bin/{program}"), "exit 1");
    }
    let text = text(hypervisor);
    let text = [("vmlinux", "kernel"), ("bzImage", "kernel"), ("initrd.img", "initrd")]
        .iter()
        .fold(text, |text, (from, to)| text.replace(&format!("/usr/share/caisson/{from}"), &format!("DIR/{to}")));
    host.write("etc/configuration.toml", &text)
}

/// Where the drop-in `number` lies.
fn drop_in(number: usize) -> String {
    format!("etc/config.d/{:02}-more.toml", number + 1)
}

/// What it says in one `round` of changes.
fn settings(number: usize, round: usize) -> String {
    let timeout = 60_000 + number + round;
    format!("# {number}\n[agent]\ndebug_console_enabled = false\n[runtime]\nboot_timeout_ms = {timeout}\n")
}

fn start(host: &Host) -> (ConfigService, Child) {
    let service = host.service();
    let listener = listen::bind(&host.path("run/config.sock")).unwrap();
    let mut command = Command::new(host.path("bin/caisson-config-service"));
    command.args(["serve", "--idle-timeout", "0"]).stdin(listen::as_stdin(listener)).stderr(Stdio::null());
    (service, command.spawn().unwrap())
}

async fn timed(service: &ConfigService, file: &Path) -> Duration {
    let begun = Instant::now();
    ask(service, file).await.unwrap();
    begun.elapsed()
}

async fn times(count: usize, measure: impl AsyncFn(usize) -> Duration) -> Vec<Duration> {
    let mut times = Vec::new();
    for round in 0..count {
        times.push(measure(round).await);
    }
    times
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// What the process has computed so far.
fn cpu_ms(pid: u32) -> f64 {
    let schedstat = fs::read_to_string(format!("/proc/{pid}/schedstat")).unwrap();
    schedstat.split(' ').next().unwrap().parse::<f64>().unwrap() / 1e6
}

fn pss_kib(pid: u32) -> f64 {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse().unwrap()
}
