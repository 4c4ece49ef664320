//! Says what is being done: a spinner on a terminal, plain lines elsewhere.

use std::borrow::Cow;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// How often the spinner turns.
const TURN: Duration = Duration::from_millis(120);

/// Where the work shows itself, on standard error.
pub struct Progress {
    bar: ProgressBar,
    quiet: bool,
}

impl Progress {
    /// For people.
    pub fn visible() -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed:.dim}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(TURN);
        Self { bar, quiet: false }
    }

    /// For callers that show nothing.
    pub fn silent() -> Self {
        Self { bar: ProgressBar::hidden(), quiet: true }
    }

    /// What is being done from now on.
    pub fn step(&self, message: impl Into<Cow<'static, str>>) {
        let message = message.into();
        if self.bar.is_hidden() && !self.quiet {
            eprintln!("{message}");
        }
        self.bar.set_message(message);
    }

    /// Shows how a long step goes on, on a terminal only.
    pub fn detail(&self, message: impl Into<Cow<'static, str>>) {
        self.bar.set_message(message);
    }

    /// Clears the line.
    pub fn done(&self) {
        self.bar.finish_and_clear();
    }
}
