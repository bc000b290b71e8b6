//! Decisions by the words of `model::Policy`, all of them pure: no async, no I/O, no locks, time and randomness
//! as arguments. What was decided is carried out by the two stories.

pub mod authorization;
pub mod budget;
pub mod deadline;
pub mod health;
pub mod response;
pub mod retry;
