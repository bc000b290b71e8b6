//! What the tests of the whole mesh share: pods made of network namespaces, processes, the programs under test.
//! A test begins with [`can_run`]; then it makes a [`Network`] and pods in it; everything ends when it is dropped,
//! after a panic too. Traffic stays inside those namespaces.

mod cluster;
mod consul;
mod forge;
mod mesh;
mod network;
mod process;
mod program;

pub use cluster::{Answer, Cluster};
pub use consul::Consul;
pub use forge::{Forged, Forger};
pub use mesh::{Mesh, Sidecar, TRUST_DOMAIN, identity};
pub use network::{Netns, Network, Pod};
pub use process::{Process, output_of, pause, until};
pub use program::{Need, can_run, program, program_for_everyone, python};
