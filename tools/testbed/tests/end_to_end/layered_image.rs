//! An image of several layers, each with the files that a test gives it.

use std::{collections::BTreeMap, io::Write};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

/// An OCI image in the making.
pub struct LayeredImage {
    name: &'static str,
    layers: Vec<Value>,
    blobs: BTreeMap<String, Vec<u8>>,
}

/// Its next layer.
pub struct Layer<'a> {
    image: &'a mut LayeredImage,
    tar: Builder<Vec<u8>>,
}

impl LayeredImage {
    pub fn new(name: &'static str) -> Self {
        Self { name, layers: Vec::new(), blobs: BTreeMap::new() }
    }

    /// A layer on top of those that were added.
    pub fn layer(&mut self) -> Layer<'_> {
        Layer { image: self, tar: Builder::new(Vec::new()) }
    }

    /// What `ctr images import` takes.
    pub fn archive(mut self) -> Result<tempfile::NamedTempFile> {
        let digests: Vec<_> = self.layers.iter().map(|layer| layer["digest"].clone()).collect();
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": { "Env": ["PATH=/bin"] },
            "rootfs": { "type": "layers", "diff_ids": digests },
        });
        let config = self.blob("application/vnd.oci.image.config.v1+json", config.to_string().into_bytes());
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({ "schemaVersion": 2, "mediaType": media_type, "config": config, "layers": self.layers });
        let mut entry = self.blob(media_type, manifest.to_string().into_bytes());
        entry["annotations"] = json!({ "io.containerd.image.name": self.name });
        let index = json!({ "schemaVersion": 2, "manifests": [entry] });

        let mut tar = Builder::new(tempfile::NamedTempFile::new()?);
        append(&mut tar, "oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        append(&mut tar, "index.json", 0o644, index.to_string().as_bytes())?;
        for (digest, blob) in &self.blobs {
            append(&mut tar, &format!("blobs/sha256/{digest}"), 0o644, blob)?;
        }
        tar.into_inner().context("write the image's archive")
    }

    fn blob(&mut self, media_type: &str, bytes: Vec<u8>) -> Value {
        let digest: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        let descriptor = json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": bytes.len() });
        self.blobs.insert(digest, bytes);
        descriptor
    }
}

impl Layer<'_> {
    pub fn file(&mut self, path: &str, text: &str) -> Result<()> {
        append(&mut self.tar, path, 0o644, text.as_bytes())
    }

    pub fn program(&mut self, path: &str, bytes: &[u8]) -> Result<()> {
        append(&mut self.tar, path, 0o755, bytes)
    }

    pub fn link(&mut self, path: &str, target: &str) -> Result<()> {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Symlink);
        header.set_size(0);
        self.tar.append_link(&mut header, path, target).with_context(|| format!("add {path}"))
    }

    /// Adds the layer to the image.
    pub fn add(self) -> Result<()> {
        let bytes = self.tar.into_inner().context("finish a layer")?;
        let layer = self.image.blob("application/vnd.oci.image.layer.v1.tar", bytes);
        self.image.layers.push(layer);
        Ok(())
    }
}

fn append(tar: &mut Builder<impl Write>, path: &str, mode: u32, bytes: &[u8]) -> Result<()> {
    let mut header = Header::new_gnu();
    header.set_mode(mode);
    header.set_size(bytes.len() as u64);
    tar.append_data(&mut header, path, bytes).with_context(|| format!("add {path}"))
}
