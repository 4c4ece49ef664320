//! What happened in the guest, kept until the host listens.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
};

use caisson_protocol::guest::Event;
use tokio::sync::Notify;

/// What is kept at most while nobody listens; the oldest goes first.
const LIMIT: usize = 4096;

/// Events on their way to the host.
#[derive(Clone, Default)]
pub struct Events(Arc<Queue>);

#[derive(Default)]
struct Queue {
    waiting: Mutex<VecDeque<Event>>,
    more: Notify,
}

impl Events {
    /// Adds what just happened.
    pub fn push(&self, event: Event) {
        let mut waiting = self.waiting();
        if waiting.len() == LIMIT {
            waiting.pop_front();
            tracing::warn!("nobody listens: the oldest event is lost");
        }
        waiting.push_back(event);
        drop(waiting);
        self.0.more.notify_one();
    }

    /// Puts back what could not be told.
    pub fn push_back(&self, event: Event) {
        self.waiting().push_front(event);
    }

    /// Waits for the next one.
    pub async fn next(&self) -> Event {
        loop {
            if let Some(event) = self.waiting().pop_front() {
                return event;
            }
            self.0.more.notified().await;
        }
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, VecDeque<Event>> {
        self.0.waiting.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use caisson_protocol::guest::OutOfMemory;

    fn event(id: &str) -> Event {
        let mut event = Event::new();
        event.set_out_of_memory(OutOfMemory { container_id: id.into(), ..Default::default() });
        event
    }

    #[tokio::test]
    async fn what_happened_before_anybody_listened_is_told_in_order() {
        let events = Events::default();
        events.push(event("a"));
        events.push(event("b"));
        assert_eq!(events.next().await.out_of_memory().container_id, "a");
        assert_eq!(events.next().await.out_of_memory().container_id, "b");
    }

    #[tokio::test]
    async fn the_oldest_is_lost_when_nobody_listens() {
        let events = Events::default();
        events.push(event("lost"));
        for _ in 0..LIMIT {
            events.push(event("kept"));
        }
        assert_eq!(events.next().await.out_of_memory().container_id, "kept");
    }
}
