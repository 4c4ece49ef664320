//! What QEMU does not go without: programs beside it that devices of its VM need, and the names of its sockets.

use std::path::PathBuf;

use caisson_vmm_launcher::{
    Result,
    guest_vsock::VsockServer,
    outlive::{Known, Lifetime},
    sockets::Sockets,
    virtiofsd::{FileServers, KnownFileServers},
};
use serde::{Deserialize, Serialize};

/// What lives as long as QEMU does.
#[derive(Default)]
pub struct Helpers {
    pub file_servers: FileServers,
    pub vsock: Option<VsockServer>,
    /// Where another launcher finds QEMU.
    pub sockets: Sockets,
}

/// [`Helpers`] for another launcher.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct KnownHelpers {
    file_servers: KnownFileServers,
    /// By its socket.
    vsock: Option<(PathBuf, Known)>,
}

impl Helpers {
    /// Those that another launcher has started.
    ///
    /// # Errors
    /// When one is gone.
    pub fn adopt(known: &KnownHelpers, sockets: Sockets) -> Result<Self> {
        let vsock = known.vsock.as_ref().map(|(socket, known)| VsockServer::adopt(socket, known));
        Ok(Self { file_servers: FileServers::adopt(&known.file_servers)?, vsock: vsock.transpose()?, sockets })
    }

    /// For another launcher, those that outlive this one.
    ///
    /// # Errors
    /// When one has ended.
    pub fn known(&self, lifetime: &Lifetime) -> Result<KnownHelpers> {
        Ok(KnownHelpers {
            file_servers: self.file_servers.known(lifetime),
            vsock: self.vsock.as_ref().and_then(VsockServer::known),
        })
    }

    /// Answers with the words of the first that fails; never when none does.
    pub async fn failed(&self) -> String {
        let vsock = async {
            match &self.vsock {
                Some(vsock) => vsock.failed().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            helper = self.file_servers.failed() => helper,
            helper = vsock => helper,
        }
    }

    /// Ends the programs, and removes the names.
    pub async fn end(self) {
        self.file_servers.end().await;
        if let Some(vsock) = self.vsock {
            vsock.end().await;
        }
    }
}
