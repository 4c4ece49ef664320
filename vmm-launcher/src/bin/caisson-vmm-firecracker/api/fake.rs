//! A Firecracker that has an API and nothing behind it. It refuses what the real one was seen to refuse: fields that it
//! does not know or misses, ids that differ or have other letters, and calls that come too early or too late.

use std::collections::HashSet;

use hyper::{Method, StatusCode};
use serde::Deserialize;
use serde_json::{Value, from_value, json};
use tokio::net::UnixStream;

#[path = "../../../../tests/fakes/http_server.rs"]
mod http_server;

use http_server::Asked;

/// What the guest does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Guest {
    #[default]
    NotStarted,
    Running,
    Paused,
}

/// Its guest gives at once.
#[derive(Clone, Copy, Debug)]
struct Balloon {
    holds_mib: u32,
    has_statistics: bool,
}

/// One such Firecracker.
#[derive(Debug, Default)]
pub struct Fake {
    pub guest: Guest,
    drives: HashSet<String>,
    has_kernel: bool,
    huge_pages: Option<String>,
    hotplug_mib: Option<u64>,
    /// Its guest takes at once what is added.
    plugged_mib: u64,
    balloon: Option<Balloon>,
    /// Whether anything was said of the VM, after which no snapshot can be loaded.
    configured: bool,
    /// The beginning of paths that it has not yet.
    without: Option<&'static str>,
}

macro_rules! body {
    ($name:ident { $($field:ident: $type:ty),* $(,)? }) => {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        #[allow(dead_code)]
        struct $name { $($field: $type),* }
    };
}

body!(Action { action_type: String });
body!(Logger { level: String });
body!(Machine { vcpu_count: u8, mem_size_mib: usize, huge_pages: Option<String> });
body!(Memory { total_size_mib: u64, slot_size_mib: u64 });
body!(RequestedMemory { requested_size_mib: u64 });
body!(Boot { kernel_image_path: String, boot_args: Option<String>, initrd_path: Option<String> });
body!(Drive { drive_id: String, path_on_host: String, is_root_device: bool, is_read_only: bool });
body!(DriveChange { drive_id: String, path_on_host: String });
body!(Iface { iface_id: String, host_dev_name: String, guest_mac: String });
body!(VsockDevice { guest_cid: u32, uds_path: String });
body!(PmemDevice { id: String, path_on_host: String, read_only: bool });
body!(BalloonDevice { amount_mib: u32, deflate_on_oom: bool, stats_polling_interval_s: u16, free_page_reporting: Option<bool> });
body!(BalloonSize { amount_mib: u32 });
body!(Entropy {});
body!(State { state: String });
body!(Create { snapshot_type: String, snapshot_path: String, mem_file_path: String });
body!(Backend { backend_type: String, backend_path: String });
body!(Tap { iface_id: String, host_dev_name: String });
body!(Load { snapshot_path: String, mem_backend: Backend, resume_vm: bool, network_overrides: Option<Vec<Tap>> });

const TOO_LATE: &str = "The requested operation is not supported after starting the microVM.";
const TOO_EARLY: &str = "The requested operation is not supported before starting the microVM.";

type Done = Result<(), String>;

impl Fake {
    /// A connection to one whose guest has not started.
    pub fn serve() -> UnixStream {
        Self::default().serve_itself()
    }

    /// A connection to an old one, which has nothing below `path`.
    pub fn serve_without(path: &'static str) -> UnixStream {
        Self { without: Some(path), ..Self::default() }.serve_itself()
    }

    fn serve_itself(mut self) -> UnixStream {
        let mut answer = move |asked: Asked<'_>| match *asked.method {
            Method::GET => self.tell(asked.path).map(Some),
            _ => self.answer(asked.method, asked.path, asked.body).map(|()| None),
        };
        http_server::serve(move |asked| match answer(asked) {
            Ok(None) => (StatusCode::NO_CONTENT, None),
            Ok(told) => (StatusCode::OK, told),
            Err(fault) => (StatusCode::BAD_REQUEST, Some(json!({ "fault_message": fault }))),
        })
    }

    fn tell(&self, path: &str) -> Result<Value, String> {
        match (path, self.balloon) {
            ("/", _) => Ok(json!({ "state": match self.guest {
                Guest::NotStarted => "Not started",
                Guest::Running => "Running",
                Guest::Paused => "Paused",
            } })),
            ("/machine-config", _) => Ok(json!({ "huge_pages": self.huge_pages.as_deref().unwrap_or("None") })),
            ("/hotplug/memory", _) => {
                self.started()?;
                self.hotplug_mib.ok_or("Device not found")?;
                Ok(json!({ "plugged_size_mib": self.plugged_mib }))
            }
            ("/balloon/statistics", Some(Balloon { has_statistics: true, holds_mib })) => {
                self.started().map(|()| json!({ "target_mib": holds_mib, "actual_mib": holds_mib }))
            }
            ("/balloon/statistics", Some(_)) => Err("Statistics for the balloon device are not enabled".into()),
            ("/balloon/statistics", None) => Err("Device not found".into()),
            _ => Err(unknown(&Method::GET, path)),
        }
    }

    /// What it does about one request.
    pub fn answer(&mut self, method: &Method, path: &str, body: Option<Value>) -> Done {
        if self.without.is_some_and(|gone| path.starts_with(gone)) {
            return Err(unknown(method, path));
        }
        let Some(body) = body else { return Err(format!("Empty {method} request.")) };
        let path = path.trim_start_matches('/');
        let (first, rest) = path.split_once('/').unwrap_or((path, ""));
        match (method.as_str(), first, rest) {
            ("PUT", "actions", "") => self.act(&read::<Action>(body)?.action_type),
            ("PUT", "logger", "") => read::<Logger>(body).map(drop),
            ("PUT", "snapshot", "create") => {
                read::<Create>(body)?;
                self.when(Guest::Paused, "save/restore unavailable while running")
            }
            ("PUT", "snapshot", "load") => self.load(&read::<Load>(body)?),
            ("PUT", ..) => self.configure(first, rest, body, path),
            ("PATCH", "vm", "") => self.change_state(&read::<State>(body)?.state),
            ("PATCH", "drives", id) => {
                let drive = read::<DriveChange>(body)?;
                identified(id, &drive.drive_id)?;
                self.started()?;
                if self.drives.contains(id) { Ok(()) } else { Err(format!("Invalid block device ID: {id}")) }
            }
            ("PATCH", "balloon", "") => {
                let wanted = read::<BalloonSize>(body)?.amount_mib;
                self.started()?;
                self.balloon.as_mut().ok_or("Device not found")?.holds_mib = wanted;
                Ok(())
            }
            ("PATCH", "hotplug", "memory") => {
                let wanted = read::<RequestedMemory>(body)?.requested_size_mib;
                self.started()?;
                match self.hotplug_mib {
                    None => Err("Device not found".into()),
                    Some(most) if wanted > most => Err(format!("requested size {wanted} MiB is above {most} MiB")),
                    Some(_) => {
                        self.plugged_mib = wanted;
                        Ok(())
                    }
                }
            }
            _ => Err(unknown(method, path)),
        }
    }

    fn configure(&mut self, first: &str, rest: &str, body: Value, path: &str) -> Done {
        match (first, rest) {
            ("machine-config", "") => self.huge_pages = read::<Machine>(body)?.huge_pages,
            ("hotplug", "memory") => {
                let memory = read::<Memory>(body)?;
                if memory.total_size_mib % memory.slot_size_mib != 0 {
                    return Err("Total size must be a multiple of slot size".into());
                }
                self.hotplug_mib = Some(memory.total_size_mib);
            }
            ("boot-source", "") => {
                read::<Boot>(body)?;
                self.has_kernel = true;
            }
            ("drives", id) => {
                identified(id, &read::<Drive>(body)?.drive_id)?;
                self.drives.insert(id.to_owned());
            }
            ("network-interfaces", id) => identified(id, &read::<Iface>(body)?.iface_id)?,
            ("vsock", "") => read::<VsockDevice>(body).map(drop)?,
            ("pmem", id) => identified(id, &read::<PmemDevice>(body)?.id)?,
            ("balloon", "") => {
                let device = read::<BalloonDevice>(body)?;
                let has_statistics = device.stats_polling_interval_s > 0;
                self.balloon = Some(Balloon { holds_mib: device.amount_mib, has_statistics });
            }
            ("entropy", "") => read::<Entropy>(body).map(drop)?,
            _ => return Err(unknown(&Method::PUT, path)),
        }
        if self.guest != Guest::NotStarted {
            return Err(TOO_LATE.into());
        }
        self.configured = true;
        Ok(())
    }

    fn act(&mut self, action: &str) -> Done {
        match (action, self.guest) {
            ("InstanceStart", Guest::NotStarted) if !self.has_kernel => {
                Err("Cannot start microvm without kernel configuration.".into())
            }
            ("InstanceStart", Guest::NotStarted) => {
                self.guest = Guest::Running;
                Ok(())
            }
            ("InstanceStart", Guest::Running | Guest::Paused) => Err(TOO_LATE.into()),
            ("SendCtrlAltDel" | "FlushMetrics", _) => self.started(),
            _ => Err(format!("unknown variant `{action}`")),
        }
    }

    fn load(&mut self, load: &Load) -> Done {
        match self.guest {
            Guest::Running | Guest::Paused => Err(TOO_LATE.into()),
            Guest::NotStarted if self.configured => Err("Load snapshot error: Loading a microVM snapshot not allowed \
                                                         after configuring boot-specific resources."
                .into()),
            Guest::NotStarted => {
                self.guest = if load.resume_vm { Guest::Running } else { Guest::Paused };
                Ok(())
            }
        }
    }

    /// It may be what it is already.
    fn change_state(&mut self, state: &str) -> Done {
        self.started()?;
        self.guest = match state {
            "Paused" => Guest::Paused,
            "Resumed" => Guest::Running,
            _ => return Err(format!("unknown variant `{state}`, expected `Paused` or `Resumed`")),
        };
        Ok(())
    }

    fn when(&self, guest: Guest, otherwise: &str) -> Done {
        self.started()?;
        if self.guest == guest { Ok(()) } else { Err(otherwise.into()) }
    }

    fn started(&self) -> Done {
        if self.guest == Guest::NotStarted { Err(TOO_EARLY.into()) } else { Ok(()) }
    }
}

fn read<T: for<'a> Deserialize<'a>>(body: Value) -> Result<T, String> {
    from_value(body)
        .map_err(|error| format!("An error occurred when deserializing the json body of a request: {error}."))
}

fn unknown(method: &Method, path: &str) -> String {
    format!("Invalid request method and/or path: {method} {}.", path.trim_start_matches('/'))
}

fn identified(path_id: &str, id: &str) -> Done {
    if path_id.is_empty() || !id.chars().all(|letter| letter == '_' || letter.is_alphanumeric()) {
        return Err("API Resource IDs can only contain alphanumeric characters and underscores.".into());
    }
    if id == path_id { Ok(()) } else { Err("The id from the path does not match the id from the body!".into()) }
}
