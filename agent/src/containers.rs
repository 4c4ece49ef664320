//! All containers of the guest, by id. A container that is being made holds its place, and no lock.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use caisson_protocol::{containerd::api::CreateTaskRequest, id::Id};
use nix::unistd::Pid;

use crate::{
    container::Container,
    error::{Error, Result},
    events::Events,
    reaper::Reaper,
};

/// All containers.
pub struct Containers {
    places: Mutex<HashMap<String, Option<Arc<Container>>>>,
    /// Collects their processes.
    pub reaper: Reaper,
    /// Tells of them.
    pub events: Events,
}

impl Containers {
    /// None yet.
    pub fn new(reaper: Reaper) -> Self {
        Self { places: Mutex::default(), reaper, events: Events::default() }
    }

    /// Makes one.
    ///
    /// # Errors
    /// When the id is none or taken, or the container cannot be made.
    pub async fn create(&self, request: &CreateTaskRequest) -> Result<Pid> {
        Id::parse("container id", &request.id).map_err(|error| Error::Invalid(error.to_string()))?;
        let place = Place::take(self, &request.id)?;
        let container = Container::create(&self.reaper, &self.events, request).await?;
        let pid = container.init.state().pid();
        place.fill(container);
        pid.ok_or_else(|| Error::Launch(format!("container {} has no process", request.id)))
    }

    /// Finds one.
    ///
    /// # Errors
    /// When there is none, or it is still being made.
    pub fn get(&self, id: &str) -> Result<Arc<Container>> {
        match self.places().get(id) {
            Some(Some(container)) => Ok(container.clone()),
            Some(None) => Err(Error::WrongState(format!("container {id} is still being made"))),
            None => Err(Error::NotFound(format!("no container {id}"))),
        }
    }

    /// Forgets one.
    pub fn remove(&self, id: &str) {
        self.places().remove(id);
    }

    /// Those that are made.
    pub fn all(&self) -> Vec<Arc<Container>> {
        self.places().values().flatten().cloned().collect()
    }

    fn places(&self) -> MutexGuard<'_, HashMap<String, Option<Arc<Container>>>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Held while a container is being made; given up when that fails or is cut off.
struct Place<'a> {
    containers: &'a Containers,
    id: &'a str,
}

impl<'a> Place<'a> {
    fn take(containers: &'a Containers, id: &'a str) -> Result<Self> {
        let mut places = containers.places();
        if places.contains_key(id) {
            return Err(Error::AlreadyExists(format!("there is already a container {id}")));
        }
        places.insert(id.to_owned(), None);
        Ok(Self { containers, id })
    }

    fn fill(self, container: Container) {
        self.containers.places().insert(self.id.to_owned(), Some(Arc::new(container)));
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut places = self.containers.places();
        if matches!(places.get(self.id), Some(None)) {
            places.remove(self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_taken_while_its_container_is_being_made() {
        let containers = Containers::new(Reaper::default());
        let place = Place::take(&containers, "web").unwrap();
        assert!(matches!(Place::take(&containers, "web"), Err(Error::AlreadyExists(_))));
        assert!(matches!(containers.get("web"), Err(Error::WrongState(_))));
        drop(place);
        assert!(matches!(containers.get("web"), Err(Error::NotFound(_))));
    }

    #[tokio::test]
    async fn a_path_is_no_container_id() {
        let containers = Containers::new(Reaper::default());
        let request = CreateTaskRequest { id: "../x".into(), ..Default::default() };
        assert!(matches!(containers.create(&request).await, Err(Error::Invalid(_))));
    }
}
