//! A host with caisson installed, as far as the config-service sees one.
#![allow(dead_code, reason = "each test program uses a part")]

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use caisson_config_service::{
    client::ConfigService,
    installation::Installation,
    problem::Problems,
    resolve::{Resolved, Resolver},
};
use caisson_protocol::config::{ResolveRequest, SandboxConfig};
use tempfile::TempDir;

/// What the fake launcher tells.
const OPTIONS: &str = r#"[
    {"key": "machine_type", "type": "string", "default": "microvm", "accepted": ["microvm", "q35"], "doc": "board"},
    {"key": "block_device_driver", "type": "string", "default": "virtio-blk",
     "accepted": ["virtio-blk", "virtio-blk-pci"], "needs": {"virtio-blk-pci": {"machine_type": "q35"}}, "doc": "bus"},
    {"key": "queue_size", "type": "integer", "default": 128, "accepted": "a power of two", "doc": "ring length"},
    {"key": "enable_iothreads", "type": "bool", "default": false, "accepted": null, "doc": "own threads for I/O"},
    {"key": "hotplug_slots", "type": "integer", "default": 4, "minimum": 0, "maximum": 255, "doc": "empty slots"},
    {"key": "extra_args", "type": "array", "default": [], "doc": "more arguments"},
    {"key": "firmware_tool", "type": "program", "default": "", "doc": "a helper"}
]"#;

/// What the fake launcher's hypervisor can do.
pub const CAPABILITIES: &str = r#"{
    "version": "9.1", "accelerator": "kvm", "devices": ["block", "fs", "net"], "operations": ["pause", "resize-vcpus", "resize-memory"]
}"#;

/// Longer than anything here takes on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(30);

pub struct Host {
    root: TempDir,
}

impl Host {
    /// With a launcher for QEMU, a kernel, an initrd and a virtiofsd, and no configuration.
    pub fn new() -> Self {
        let host = Self { root: tempfile::tempdir().unwrap() };
        for dir in ["bin", "etc/config.d", "run", "share/defaults/caisson"] {
            fs::create_dir_all(host.path(dir)).unwrap();
        }
        fs::write(host.path("kernel"), "").unwrap();
        fs::write(host.path("initrd"), "").unwrap();
        host.program("bin/virtiofsd", "exit 1");
        host.launcher("qemu", OPTIONS);
        host
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// Writes a file; `DIR` in its text stands for the host's root.
    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, self.text(text)).unwrap();
        path
    }

    /// The smallest configuration without problems, with `more` at its end.
    pub fn configure(&self, more: &str) -> PathBuf {
        self.configure_as("etc/configuration.toml", more)
    }

    /// The same in another file.
    pub fn configure_as(&self, name: &str, more: &str) -> PathBuf {
        let files = "[hypervisor.qemu]\nkernel = \"DIR/kernel\"\nvirtio_fs_daemon = \"DIR/bin/virtiofsd\"\n";
        self.write(name, &format!("{files}{more}"))
    }

    pub fn launcher(&self, hypervisor: &str, options: &str) {
        self.able_launcher(hypervisor, options, CAPABILITIES);
    }

    pub fn able_launcher(&self, hypervisor: &str, options: &str, capabilities: &str) {
        let tell = |text| format!("cat <<'END'\n{text}\nEND\n");
        let script = format!("if [ $1 = options ]; then\n{}else\n{}fi", tell(options), tell(capabilities));
        self.program(&format!("bin/caisson-vmm-{hypervisor}"), &script);
    }

    pub fn program(&self, name: &str, script: &str) {
        let path = self.path(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    pub fn installation(&self) -> Installation {
        Installation {
            configurations: vec![self.path("etc/configuration.toml"), self.path(SHIPPED)],
            program_dirs: vec![self.path("bin")],
        }
    }

    /// What the lookup order's configuration comes to.
    pub async fn resolve(&self) -> Result<Resolved, Vec<String>> {
        self.resolve_file(None).await
    }

    /// What the lookup order's configuration comes to for a container with these annotations.
    pub async fn resolve_for(&self, annotations: &[(&str, &str)]) -> Result<Resolved, Vec<String>> {
        let annotations = annotations.iter().map(|(name, text)| ((*name).to_owned(), self.text(text))).collect();
        let resolved = Resolver::new(self.installation()).resolve_for(None, &annotations).await;
        resolved.map_err(|problems| self.sentences(&problems))
    }

    /// What `file` comes to. The host's root is `DIR` in messages.
    pub async fn resolve_file(&self, file: Option<&Path>) -> Result<Resolved, Vec<String>> {
        let resolved = Resolver::new(self.installation()).resolve(file).await;
        resolved.map_err(|problems| self.sentences(&problems))
    }

    /// Each problem, with `DIR` for the host's root.
    pub fn sentences(&self, problems: &Problems) -> Vec<String> {
        problems.sentences().iter().map(|text| self.shortened(text)).collect()
    }

    /// `text` with `DIR` for the host's root.
    pub fn shortened(&self, text: &str) -> String {
        text.replace(&self.root.path().display().to_string(), "DIR")
    }

    /// `text` with the host's root for `DIR`.
    pub fn text(&self, text: &str) -> String {
        text.replace("DIR", &self.root.path().display().to_string())
    }

    /// A configuration that comes with the installation, for a launcher without options.
    pub fn installed(&self, hypervisor: &str, more: &str) -> PathBuf {
        self.launcher(hypervisor, "[]");
        let files = "kernel = \"DIR/kernel\"\nvirtio_fs_daemon = \"DIR/bin/virtiofsd\"";
        let name = format!("share/defaults/caisson/configuration-{hypervisor}.toml");
        self.write(&name, &format!("[hypervisor.{hypervisor}]\n{files}\n{more}"))
    }

    /// A service on this host, which is started by the first call.
    pub fn service(&self) -> ConfigService {
        let program = self.path("bin/caisson-config-service");
        if !program.exists() {
            fs::copy(env!("CARGO_BIN_EXE_caisson-config-service"), &program).unwrap();
        }
        ConfigService::new(&self.path("run/config.sock"), vec![self.path("bin")])
    }
}

/// Where the installation's own configuration lies.
pub const SHIPPED: &str = "share/defaults/caisson/configuration.toml";

/// Asks `service` for `file`.
pub async fn ask(service: &ConfigService, file: &Path) -> Result<SandboxConfig, String> {
    let config_path = file.display().to_string();
    let request = ResolveRequest { config_path, ..Default::default() };
    service.resolve(&request, LIMIT).await.map_err(|error| caisson_protocol::status::sentence(&error))
}
