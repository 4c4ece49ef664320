//! What happens to the VM, as Cloud Hypervisor tells it: JSON objects with an empty line after each, `docs/api.md` of
//! Cloud Hypervisor. They are bounded, because it runs beside a hostile guest.

use std::{io, os::fd::OwnedFd};

use caisson_vmm_launcher::process::{lasting_pipe, reopen};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, BufReader},
    net::unix::pipe::Receiver,
    sync::{mpsc, watch},
};
use tracing::debug;

/// Devices that are taken away at once, before whoever follows them is waited for.
const REMOVED: usize = 64;
/// An event has some hundred bytes.
const MAX_EVENT: usize = 1 << 16;

/// The events of one Cloud Hypervisor.
#[derive(Debug)]
pub struct Events {
    reboot: watch::Receiver<bool>,
}

/// The names of devices that the guest has let go of, as it does.
pub type Removed = mpsc::Receiver<String>;

impl Events {
    /// A listener, and the descriptor for `--event-monitor`.
    ///
    /// # Errors
    /// When the host makes no pipe.
    pub fn pipe() -> io::Result<(Self, Removed, OwnedFd)> {
        let (near, far) = lasting_pipe()?;
        let (events, removed) = Self::over(near);
        Ok((events, removed, far))
    }

    /// A listener to process `pid`, which has the descriptor as `number`.
    ///
    /// # Errors
    /// When it is gone.
    pub fn adopt(pid: u32, number: i32) -> io::Result<(Self, Removed)> {
        reopen(pid, number).map(Self::over)
    }

    fn over(near: Receiver) -> (Self, Removed) {
        let (tell_removed, removed) = mpsc::channel(REMOVED);
        let (tell_reboot, reboot) = watch::channel(false);
        tokio::spawn(read(near, tell_removed, tell_reboot));
        (Self { reboot }, removed)
    }

    /// Answers when the guest reboots. Cloud Hypervisor would start it again.
    pub async fn rebooting(&self) {
        let mut reboot = self.reboot.clone();
        if reboot.wait_for(|reboot| *reboot).await.is_err() {
            std::future::pending().await
        }
    }

    /// Whether the guest has rebooted.
    pub fn has_rebooted(&self) -> bool {
        *self.reboot.borrow()
    }
}

/// Whether `event` is `name` of `source`.
fn is(event: &Value, source: &str, name: &str) -> bool {
    event["source"] == source && event["event"] == name
}

async fn read(stream: Receiver, removed: mpsc::Sender<String>, reboot: watch::Sender<bool>) {
    let mut stream = BufReader::new(stream);
    let mut text = Vec::new();
    let mut buffer = [0; 1024];
    while let Ok(count @ 1..) = stream.read(&mut buffer).await {
        text.extend_from_slice(&buffer[..count]);
        while let Some(end) = text.windows(2).position(|pair| pair == b"\n\n") {
            let event: Vec<u8> = text.drain(..end + 2).collect();
            let Ok(event) = serde_json::from_slice::<Value>(&event) else { continue };
            debug!(%event, "Cloud Hypervisor event");
            if is(&event, "vm", "rebooting") {
                reboot.send_replace(true);
            }
            if is(&event, "vm", "device-removed")
                && let Some(id) = event["properties"]["id"].as_str()
            {
                let _ = removed.send(id.to_owned()).await;
            }
        }
        if text.len() > MAX_EVENT {
            debug!("Cloud Hypervisor sends something else than events");
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Write};

    use super::*;

    #[tokio::test]
    async fn an_event_that_comes_in_pieces_is_one() {
        let (events, mut removed, far) = Events::pipe().unwrap();
        let mut far = File::from(far);
        far.write_all(b"{\n  \"source\": \"vm\",\n  \"event\": \"device-rem").unwrap();
        far.write_all(b"oved\",\n  \"properties\": {\"id\": \"disk\"}\n}\n\n").unwrap();
        far.write_all(b"{\"source\": \"vm\", \"event\": \"rebooting\"}\n\n").unwrap();
        assert_eq!(removed.recv().await.as_deref(), Some("disk"));
        events.rebooting().await;
        assert!(events.has_rebooted());
    }

    #[tokio::test]
    async fn what_is_no_event_is_passed_over() {
        let (events, mut removed, far) = Events::pipe().unwrap();
        let mut far = File::from(far);
        far.write_all(b"]]]\n\n\n\n{\"source\": \"vm\", \"event\": \"booted\"}\n\n").unwrap();
        drop(far);
        assert_eq!(removed.recv().await, None);
        assert!(!events.has_rebooted());
    }
}
