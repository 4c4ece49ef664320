//! The virtio-serial port to the host.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Context, Result, bail};
use caisson_test_host::{Frame, Job, PORT};
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket};

const PORTS: &str = "/sys/class/virtio-ports";
/// The kernel's own multicast group of device events, `lib/kobject_uevent.c`.
const KERNEL_EVENTS: u32 = 1;
/// Longest event: 32 variables in 2048 bytes, and the header (`include/linux/kobject.h`).
const MAX_EVENT: usize = 4096;

/// The kernel's announcements of devices.
pub struct Arrivals(OwnedFd);

impl Arrivals {
    /// From now on.
    pub fn watch() -> Result<Self> {
        let events = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkKObjectUEvent,
        );
        let events = events.context("watch for devices")?;
        bind(events.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_EVENTS)).context("watch for devices")?;
        Ok(Self(events))
    }

    fn wait(&self) -> Result<()> {
        let mut event = [0; MAX_EVENT];
        match recv(self.0.as_raw_fd(), &mut event, MsgFlags::empty()) {
            // ENOBUFS: there were more than fit, and so there was one.
            Ok(_) | Err(nix::errno::Errno::ENOBUFS) => Ok(()),
            Err(error) => Err(error).context("wait for a device"),
        }
    }
}

/// The port, open. Frames of several threads do not mix.
#[derive(Clone)]
pub struct Port {
    reader: Arc<File>,
    writer: Arc<Mutex<File>>,
}

impl Port {
    /// Waits until the port is there and the host listens.
    pub fn find(arrivals: &Arrivals) -> Result<Self> {
        let path = loop {
            match named(PORT)? {
                Some(path) => break path,
                None => arrivals.wait()?,
            }
        };
        let file = File::options().read(true).write(true).open(&path);
        let file = file.with_context(|| format!("open {}", path.display()))?;
        let writer = Arc::new(Mutex::new(file.try_clone().context("share the port")?));
        let port = Self { reader: Arc::new(file), writer };
        // The kernel keeps a writer waiting until the host has its side open; a reader would see an end.
        port.send(&Frame::Ready).context("call the host")?;
        Ok(port)
    }

    /// What this machine is for.
    pub fn receive_job(&mut self) -> Result<Job> {
        match self.receive().context("receive the job")? {
            Frame::Job(job) => Ok(job),
            other => bail!("expected the job, received {other:?}"),
        }
    }

    /// The next frame.
    pub fn receive(&self) -> io::Result<Frame> {
        Frame::read(&*self.reader)
    }

    /// Sends a frame.
    pub fn send(&self, frame: &Frame) -> io::Result<()> {
        frame.write(&*self.writer.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The port's device, as soon as the host has told its name.
fn named(name: &str) -> Result<Option<PathBuf>> {
    let Ok(ports) = fs::read_dir(PORTS) else { return Ok(None) };
    for port in ports {
        let port = port.context("read the ports")?;
        let found = fs::read_to_string(port.path().join("name")).unwrap_or_default();
        if found.trim_end() == name {
            return Ok(Some(PathBuf::from("/dev").join(port.file_name())));
        }
    }
    Ok(None)
}
