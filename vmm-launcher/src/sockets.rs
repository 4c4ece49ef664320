//! Sockets that have names only as long as somebody may connect to them.

use std::path::PathBuf;

/// Their names; removed when dropped.
#[derive(Debug, Default)]
pub struct Sockets(pub Vec<PathBuf>);

impl Drop for Sockets {
    fn drop(&mut self) {
        for socket in &self.0 {
            let _ = std::fs::remove_file(socket);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_made_is_removed_and_the_rest_is_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let [missing, made] = ["missing", "made"].map(|name| dir.path().join(name));
        std::fs::write(&made, "").unwrap();
        drop(Sockets(vec![missing, made.clone()]));
        assert!(!made.exists());
    }
}
