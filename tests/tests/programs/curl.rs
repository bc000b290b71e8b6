//! curl and nginx.

use std::fs;

use weft_tests::{Mesh, Need, can_run, identity, output_of, until};

#[test]
fn curl_reaches_nginx_through_two_sidecars() {
    if !can_run(&[Need::Root, Need::Program("nginx", "nginx-light"), Need::Program("curl", "curl")]) {
        return;
    }
    let mesh = Mesh::new();
    let (client, server) = (mesh.network.pod("client"), mesh.network.pod("server"));
    let folder = mesh.network.folder().join("nginx");
    fs::create_dir_all(folder.join("www")).unwrap();
    fs::write(folder.join("www/index.html"), "hello").unwrap();
    let conf = format!(
        "daemon off; pid {f}/pid; error_log stderr; events {{}} http {{ access_log off; server {{ listen 8080; root {f}/www; }} }}",
        f = folder.display()
    );
    fs::write(folder.join("conf"), conf).unwrap();
    let _nginx = server.start("nginx", &["-c", &folder.join("conf").display().to_string()]);
    let to = mesh.sidecar(&server, "orders", &["--port", "8080"]);
    let _from = mesh.sidecar(&client, "web", &[]);
    let mut curl = client.command("curl");
    curl.args(["-s", "-S", "-m", "5", "http://orders/"]);
    assert_eq!(output_of(curl), "hello");
    // The line is written behind the answer.
    until("the server's sidecar tells of the caller", || {
        to.access_log().iter().any(|line| line["peer_identity"] == identity("web"))
    });
}
