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

    /// The counter's frequency in kHz, from this moment until now; the longer ago, the more exact. Within the first
    /// millisecond it lasts until that is over.
    pub fn khz(&self) -> u64 {
        loop {
            let now = Self::now();
            let elapsed = now.instant.duration_since(self.instant).as_nanos();
            if elapsed >= 1_000_000 {
                let ticks = u128::from(now.ticks.wrapping_sub(self.ticks));
                return (ticks * 1_000_000 / elapsed) as u64;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_measurements_agree_to_a_hundredth() {
        let (once, again) = (Moment::now().khz(), Moment::now().khz());
        assert!(once.abs_diff(again) < once / 100, "{once} {again}");
    }
}
