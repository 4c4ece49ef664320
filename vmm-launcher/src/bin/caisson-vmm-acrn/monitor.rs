//! acrn-dm's command monitor: JSON objects on a Unix socket (devicemodel/core/cmd_monitor).

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use caisson_vmm_launcher::{Error, Result};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::timeout,
};

/// acrn-dm answers at once.
const DEADLINE: Duration = Duration::from_secs(10);
/// `CLIENT_BUF_LEN`.
const MAX_MESSAGE: usize = 4096;
/// What `CMD_ARG_MAX` leaves for a disk after its slot and before the terminating zero; longer ones are cut off.
const MAX_DISK: usize = 320 - "31,".len() - 1;

/// Where acrn-dm listens while its guest runs.
#[derive(Debug)]
pub struct Monitor {
    socket: PathBuf,
}

impl Monitor {
    /// The one of an acrn-dm that is not yet started. An earlier one's is not taken for it.
    pub fn new(run_dir: &Path) -> Self {
        let monitor = Self { socket: run_dir.join("acrn-dm.sock") };
        monitor.remove();
        monitor
    }

    /// It is there when acrn-dm has made its VM.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Removes what an ended acrn-dm has left.
    pub fn remove(&self) {
        // Most leave nothing.
        let _ = fs::remove_file(&self.socket);
    }

    /// Gives the empty disk in `slot` an image, `disk` with its options. Whether acrn-dm took it: it does not when the slot has
    /// a disk already or the image cannot be used.
    ///
    /// # Errors
    /// When acrn-dm does not answer; the slot may have the disk all the same.
    pub async fn fill_disk(&self, slot: u8, disk: &str) -> Result<bool> {
        let request = json!({ "command": "blkrescan", "arguments": format!("{slot},{disk}") });
        let answer = timeout(DEADLINE, self.exchange(&request.to_string())).await;
        let seconds = DEADLINE.as_secs();
        let answer = answer.map_err(|_| Error::Hypervisor(format!("acrn-dm does not answer within {seconds} s")))?;
        let answer = answer.map_err(Error::host(format!("ask acrn-dm on {}", self.socket.display())))?;
        match serde_json::from_str::<Value>(&answer).ok().and_then(|answer| answer["ack"].as_i64()) {
            Some(0) => Ok(true),
            Some(-1) => Ok(false),
            _ => Err(Error::Hypervisor(format!("acrn-dm does not say whether it took the disk {disk}: \"{answer}\""))),
        }
    }

    async fn exchange(&self, request: &str) -> std::io::Result<String> {
        let mut socket = UnixStream::connect(&self.socket).await?;
        socket.write_all(request.as_bytes()).await?;
        // One message is one write on its side, and it keeps the connection open afterwards.
        let mut answer = vec![0; MAX_MESSAGE];
        let count = socket.read(&mut answer).await?;
        answer.truncate(count);
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }
}

/// # Errors
/// When acrn-dm would not hear all of `disk`, and so not that it is read-only.
pub fn check(disk: &str) -> Result<()> {
    if disk.len() > MAX_DISK {
        return Err(Error::Invalid(format!(
            "the disk {disk} is too long for ACRN: {} bytes with its options, at most {MAX_DISK}",
            disk.len()
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_of_which_acrn_would_hear_a_part_is_refused() {
        let disk = |length| format!("/{},ro", "d".repeat(length - "/,ro".len()));
        assert!(check(&disk(316)).is_ok());
        let error = check(&disk(317)).unwrap_err().to_string();
        assert!(error.starts_with("the disk /ddd"), "{error}");
        assert!(error.ends_with("is too long for ACRN: 317 bytes with its options, at most 316"), "{error}");
    }
}
