//! Weft on a real Kubernetes: what the injector makes of pods, and how these work in the mesh.

#[path = "cluster/certificate.rs"]
mod certificate;
#[path = "cluster/chart.rs"]
mod chart;
#[path = "cluster/golden.rs"]
mod golden;
#[path = "cluster/joining.rs"]
mod joining;
#[path = "cluster/mirror.rs"]
mod mirror;
#[path = "cluster/odd.rs"]
mod odd;
#[path = "cluster/probes.rs"]
mod probes;
#[path = "cluster/proof.rs"]
mod proof;
#[path = "cluster/rollout.rs"]
mod rollout;
