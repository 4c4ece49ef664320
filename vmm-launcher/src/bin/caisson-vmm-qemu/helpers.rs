//! The programs beside QEMU that devices of its VM need.

use std::path::PathBuf;

use caisson_vmm_launcher::{
    Result,
    guest_vsock::VsockServer,
    outlive::Known,
    virtiofsd::{Virtiofsd, any_failed},
};
use serde::{Deserialize, Serialize};

/// What lives as long as QEMU does.
#[derive(Default)]
pub struct Helpers {
    pub file_servers: Vec<Virtiofsd>,
    pub vsock: Option<VsockServer>,
}

/// [`Helpers`] for another launcher.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct KnownHelpers {
    /// By their shares.
    file_servers: Vec<(String, Known)>,
    /// By its socket.
    vsock: Option<(PathBuf, Known)>,
}

impl Helpers {
    /// Those that another launcher has started.
    ///
    /// # Errors
    /// When one is gone.
    pub fn adopt(known: &KnownHelpers) -> Result<Self> {
        let file_servers = known.file_servers.iter().map(|(tag, known)| Virtiofsd::adopt(tag, known));
        let vsock = known.vsock.as_ref().map(|(socket, known)| VsockServer::adopt(socket, known));
        Ok(Self { file_servers: file_servers.collect::<Result<_>>()?, vsock: vsock.transpose()? })
    }

    /// For another launcher.
    ///
    /// # Errors
    /// When one has ended.
    pub fn known(&self) -> Result<KnownHelpers> {
        Ok(KnownHelpers {
            file_servers: self.file_servers.iter().map(Virtiofsd::known).collect::<Result<_>>()?,
            vsock: self.vsock.as_ref().map(VsockServer::known).transpose()?.flatten(),
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
            helper = any_failed(&self.file_servers) => helper,
            helper = vsock => helper,
        }
    }

    /// Ends them.
    pub async fn end(self) {
        for file_server in self.file_servers {
            file_server.end().await;
        }
        if let Some(vsock) = self.vsock {
            vsock.end().await;
        }
    }
}
