//! What a registry does not know, or cannot say.

use weft_sidecar::model::Failure;
use weft_tests::{Consul, Mesh, can_run};

use super::{
    Test,
    bench::{Shown, curl},
};

pub const WHAT_THE_REGISTRY_HAS_NOT: Test =
    ("what_the_registry_has_not", &[Failure::NotRegistered, Failure::RegistryUnavailable]);

#[test]
fn what_the_registry_has_not() {
    if !can_run(&Consul::NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let (client, registry) = (mesh.network.pod("client"), mesh.network.pod("registry"));
    let mut consul = Consul::dev(&registry, "");
    let sidecar = mesh.sidecar(&client, "web", &["--consul", &consul.address()]);
    let mut shown = Shown::by(WHAT_THE_REGISTRY_HAS_NOT, &sidecar, &client);
    shown.answered(Failure::NotRegistered, &curl(&client, &["http://absent.weft/"]));
    consul.stop();
    shown.answered(Failure::RegistryUnavailable, &curl(&client, &["http://unknown.weft/"]));
    shown.complete();
}
