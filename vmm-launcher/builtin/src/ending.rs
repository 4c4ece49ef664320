//! How a VM ends: the first reason counts, and whoever waits is told.

use std::sync::{Arc, OnceLock};

use tokio::sync::Notify;

/// Why a VM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest powered itself off.
    PoweredOff,
    /// The guest asked for a reset, or crashed so that the processor resets (triple fault).
    Reset,
    /// The launcher ended it.
    Forced,
    /// It cannot go on; why, in one sentence.
    Failed(String),
}

/// Where an end is told. A clone is another handle to the same VM's.
#[derive(Clone, Debug, Default)]
pub struct Ending(Arc<Told>);

#[derive(Debug, Default)]
struct Told {
    end: OnceLock<End>,
    news: Notify,
}

impl Ending {
    /// Ends the VM, if it has not ended already.
    pub fn tell(&self, end: End) {
        if self.0.end.set(end).is_ok() {
            // One permit is kept for whoever waits later: `told` is called once.
            self.0.news.notify_one();
        }
    }

    /// Whether there is an end.
    pub fn is_told(&self) -> bool {
        self.0.end.get().is_some()
    }

    /// Answers when there is an end. Called once.
    pub async fn told(&self) -> End {
        loop {
            match self.0.end.get() {
                Some(end) => return end.clone(),
                None => self.0.news.notified().await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_first_end_counts() {
        let ending = Ending::default();
        ending.tell(End::PoweredOff);
        ending.tell(End::Forced);
        assert_eq!(ending.told().await, End::PoweredOff);
    }

    #[tokio::test]
    async fn who_waits_is_told_by_another_thread() {
        let ending = Ending::default();
        let teller = ending.clone();
        let (end, ()) = tokio::join!(ending.told(), async move {
            std::thread::spawn(move || teller.tell(End::Reset));
        });
        assert_eq!(end, End::Reset);
    }
}
