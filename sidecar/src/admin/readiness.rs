//! When is the sidecar ready? When every condition that somebody named is met.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

/// All conditions. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Readiness {
    conditions: Arc<Mutex<Vec<Condition>>>,
}

/// One condition, in the hands of the part that meets it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Condition {
    name: &'static str,
    met: Arc<AtomicBool>,
}

impl Readiness {
    /// Adds a condition, not met yet. Add all before the public face is served: without any it is ready.
    pub fn condition(&self, name: &'static str) -> Condition {
        let condition = Condition { name, met: Arc::default() };
        self.conditions.lock().unwrap_or_else(PoisonError::into_inner).push(condition.clone());
        condition
    }

    /// The names of the conditions that are not met; empty: ready.
    pub fn missing(&self) -> Vec<&'static str> {
        let conditions = self.conditions.lock().unwrap_or_else(PoisonError::into_inner);
        conditions.iter().filter(|condition| !condition.is_met()).map(|condition| condition.name).collect()
    }
}

impl Condition {
    /// Says whether it is met from now on.
    pub fn set(&self, met: bool) {
        self.met.store(met, Ordering::Release);
    }

    fn is_met(&self) -> bool {
        self.met.load(Ordering::Acquire)
    }
}
