//! Failures of proving who is who. tests/tests/trust has every hostile certificate; here is one for each label.

use weft_sidecar::model::Failure;
use weft_tests::{Forged, Forger, Mesh, TRUST_DOMAIN, can_run, identity, until};

use super::{
    Test,
    bench::{NEEDS, Shown, curl, peer, start_app},
};

pub const WHOM_WE_MEET: Test =
    ("whom_we_meet", &[Failure::Handshake, Failure::WrongIdentity, Failure::UntrustedPeer]);

#[test]
fn whom_we_meet() {
    if !can_run(&NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let (client, rogue) = (mesh.network.pod("client"), mesh.network.pod("rogue"));
    let address = |port: u16| format!("{}:{port}", rogue.ipv4());
    let impostor = Forger::of_stranger(TRUST_DOMAIN, mesh.network.folder());
    let impostor = impostor.leaf("impostor", &Forged::of(&identity("orders")));
    let other = Forger::of_mesh(&mesh).leaf("other", &Forged::of(&identity("other")));
    let _plain = start_app(&rogue, &address(8080));
    let mut servers = Vec::new();
    for (port, certificate) in [(8081, &other), (8082, &impostor)] {
        let certificate = certificate.display().to_string();
        let mut server = peer(&rogue, &["tls-server", &address(port), &certificate, "weft-h2"]);
        server.wait_for_line("serving");
        servers.push(server);
    }
    let cases = [
        ("plain", 8080, Failure::Handshake),
        ("other", 8081, Failure::WrongIdentity),
        ("impostor", 8082, Failure::UntrustedPeer),
    ];
    for (name, port, _) in cases {
        let orders = identity("orders");
        mesh.write_service(
            name,
            &format!("identities: ['{orders}']\nendpoints: [{{address: '{}'}}]\n", address(port)),
        );
    }
    let sidecar = mesh.sidecar(&client, "web", &[]);
    let mut shown = Shown::by(WHOM_WE_MEET, &sidecar, &client);
    for (name, _, failure) in cases {
        let seen = curl(&client, &[&format!("http://{name}/")]);
        shown.answered(failure, &seen);
    }
    shown.complete();
}

pub const NOBODY_OURSELVES: Test = ("nobody_ourselves", &[Failure::NoIdentity]);

#[test]
fn nobody_ourselves() {
    if !can_run(&NEEDS) {
        return;
    }
    let mut mesh = Mesh::new();
    let client = mesh.network.pod("client");
    let orders = identity("orders");
    mesh.write_service(
        "orders",
        &format!("identities: ['{orders}']\naddresses: ['10.99.0.1:80']\nendpoints: [{{address: '10.77.0.99:80'}}]\n"),
    );
    mesh.stop_authority();
    let sidecar = mesh.start_sidecar(&client, "web", &[], &[]);
    let mut shown = Shown::by(NOBODY_OURSELVES, &sidecar, &client);
    let mut seen = String::new();
    // It serves before it is ready.
    until("the sidecar knows the service", || {
        seen = curl(&client, &["http://10.99.0.1/"]);
        seen.contains(" 503 ")
    });
    shown.answered(Failure::NoIdentity, &seen);
    shown.complete();
}
