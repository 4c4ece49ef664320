//! How fast this processor's time stamp counter runs.

use std::time::Instant;

use crate::sys;

/// A moment on both clocks, to be compared with a later one.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    instant: Instant,
    ticks: u64,
}

impl Moment {
    /// Now, as exactly as a few readings can tell.
    pub fn now() -> Self {
        let reading = || {
            let before = sys::time_stamp();
            let instant = Instant::now();
            let after = sys::time_stamp();
            (after.wrapping_sub(before), Self { instant, ticks: before.wrapping_add(after.wrapping_sub(before) / 2) })
        };
        // The quickest reading was interrupted least.
        (0..8).map(|_| reading()).min_by_key(|(took, _)| *took).expect("eight readings").1
    }

    /// The counter's frequency in kHz from `self` until now; the longer ago, the more exact. `None` within the first
    /// millisecond.
    pub fn khz_since(&self) -> Option<u64> {
        let now = Self::now();
        let elapsed = now.instant.duration_since(self.instant).as_nanos();
        let ticks = u128::from(now.ticks.wrapping_sub(self.ticks));
        (elapsed >= 1_000_000).then(|| (ticks * 1_000_000 / elapsed) as u64)
    }
}
