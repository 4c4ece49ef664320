//! acrn-dm's command monitor: JSON objects on a Unix socket (devicemodel/core/cmd_monitor).

use std::{path::PathBuf, time::Duration};

use caisson_vmm_launcher::{Error, Result};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::timeout,
};

/// acrn-dm answers at once.
const DEADLINE: Duration = Duration::from_secs(10);
/// `CLIENT_BUF_LEN`: longer messages are cut off.
const MAX_MESSAGE: usize = 4096;

/// Where acrn-dm listens while its guest runs.
#[derive(Debug)]
pub struct Monitor {
    pub socket: PathBuf,
}

impl Monitor {
    /// Gives the empty disk in `slot` the image `path`.
    ///
    /// # Errors
    /// When acrn-dm does not answer or refuses, which it does when the slot has a disk already or the image cannot be opened.
    pub async fn fill_disk(&self, slot: u8, path: &str) -> Result<()> {
        let request = json!({ "command": "blkrescan", "arguments": format!("{slot},{path}") });
        let answer = timeout(DEADLINE, self.exchange(&request.to_string())).await;
        let seconds = DEADLINE.as_secs();
        let answer = answer.map_err(|_| Error::Hypervisor(format!("acrn-dm does not answer within {seconds} s")))?;
        let answer = answer.map_err(Error::host(format!("ask acrn-dm on {}", self.socket.display())))?;
        match serde_json::from_str::<Value>(&answer) {
            Ok(answer) if answer["ack"] == 0 => Ok(()),
            _ => Err(Error::Hypervisor(format!("acrn-dm refused the disk {path} for its slot {slot}"))),
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
