//! Sidecars on a real Consul: they find services, survive its absence, and say what is wrong with it.

#[path = "consul/acl.rs"]
mod acl;
#[path = "consul/answers.rs"]
mod answers;
#[path = "consul/check.rs"]
mod check;
#[path = "consul/cluster.rs"]
mod cluster;
#[path = "consul/crowd.rs"]
mod crowd;
#[path = "consul/discovery.rs"]
mod discovery;
#[path = "consul/fleet.rs"]
mod fleet;
#[path = "consul/herd.rs"]
mod herd;
#[path = "consul/load.rs"]
mod load;
#[path = "consul/loss.rs"]
mod loss;
#[path = "consul/partition.rs"]
mod partition;
#[path = "consul/policies.rs"]
mod policies;
#[path = "consul/questions.rs"]
mod questions;
#[path = "consul/registration.rs"]
mod registration;
#[path = "consul/socket.rs"]
mod socket;
#[path = "consul/tls.rs"]
mod tls;
#[path = "consul/world.rs"]
mod world;
