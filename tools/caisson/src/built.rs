//! What image-builder noted of a file, in the `manifest.json` beside it.

use std::path::Path;

use anyhow::{Context, bail};

/// The release of the kernel at `path`, whose content has the digest `sha256`.
///
/// # Errors
/// When image-builder did not write it, or somebody has replaced it since.
pub(crate) fn kernel_release(path: &Path, sha256: &str) -> anyhow::Result<String> {
    let manifest = path.with_file_name("manifest.json");
    let text = std::fs::read_to_string(&manifest).with_context(|| format!("read {}", manifest.display()))?;
    let noted: serde_json::Value =
        serde_json::from_str(&text).with_context(|| format!("understand {}", manifest.display()))?;
    let kernel = &noted["kernel"];
    let mut outputs = kernel["outputs"].as_array().into_iter().flatten();
    match kernel["facts"]["release"].as_str() {
        Some(release) if outputs.any(|output| output["sha256"] == sha256) => Ok(release.to_owned()),
        _ => bail!("image-builder's manifest beside it is of another kernel"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_kernel_that_was_built_has_its_release() {
        let dir = tempfile::tempdir().unwrap();
        let kernel = dir.path().join("vmlinux");
        let told = format!("{:#}", kernel_release(&kernel, "abc").unwrap_err());
        assert!(told.starts_with("read ") && told.contains("manifest.json"), "{told}");
        let manifest =
            r#"{"kernel": {"facts": {"release": "6.1.192"}, "outputs": [{"name": "vmlinux", "sha256": "abc"}]}}"#;
        std::fs::write(dir.path().join("manifest.json"), manifest).unwrap();
        assert_eq!(kernel_release(&kernel, "abc").unwrap(), "6.1.192");
        assert!(kernel_release(&kernel, "def").is_err());
    }
}
