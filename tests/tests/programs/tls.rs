//! An app's own TLS: carried as it is inside mutual TLS of the mesh. The client sees the app's certificate, and its
//! own handshake with the app.

use std::{collections::BTreeSet, path::Path};

use weft_tests::{Need, Pod, output_of};

use super::pair::{CURL, NGINX, Pair, ROOT, can_run, curl};

#[test]
fn openssl_and_curl_see_the_apps_own_tls() {
    if !can_run(&[ROOT, CURL, NGINX, Need::Program("openssl", "openssl")]) {
        return;
    }
    let mut pair = Pair::direct(&["orders"]);
    let folder = pair.folder("tls");
    let f = folder.display();
    pair.server.shell(&format!(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=the-app \
         -addext subjectAltName=DNS:orders -keyout {f}/key.pem -out {f}/cert.pem 2>/dev/null; seq 300000 >{f}/file"
    ));
    let _nginx = pair.start_nginx(
        &format!(
            "server {{ listen 8443 ssl http2; ssl_certificate {f}/cert.pem; ssl_certificate_key {f}/key.pem;
             ssl_protocols TLSv1.2 TLSv1.3; root {f}; location /told {{ return 200 \"$server_protocol $ssl_protocol\"; }} }}"
        ),
        8443,
    );
    let direct = seen(&pair.client, &folder);
    assert!(direct[0].contains("CN = the-app") && direct[0].contains("Verify return code: 0"), "{direct:?}");
    pair.weave(&[("orders", 8443)]);
    assert_eq!(seen(&pair.client, &folder), direct);
    pair.assert_secured();
    let to = pair.to.as_ref().unwrap().access_log();
    assert!(to.iter().any(|line| line["protocol"] == "tcp" && line["security"] == "mtls"), "{to:?}");
}

fn seen(pod: &Pod, folder: &Path) -> Vec<String> {
    let certificate = folder.join("cert.pem").display().to_string();
    let mut seen = Vec::new();
    for version in ["-tls1_2", "-tls1_3"] {
        let mut s_client = pod.command("openssl");
        s_client.args(["s_client", "-connect", "orders:8443", "-servername", "orders", version]);
        s_client.args(["-verify_return_error", "-alpn", "h2", "-CAfile", &certificate]);
        let told = output_of(s_client);
        let wanted = ["subject", "issuer", "New, ", "ALPN", "Verify return", "Verification"];
        let lines = told.lines().filter(|line| wanted.iter().any(|word| line.contains(word)));
        // how many tickets arrive before s_client ends is a matter of luck
        seen.push(lines.map(str::trim).collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>().join("\n"));
    }
    for case in ["--http2", "--http1.1", "--http1.1 --tls-max 1.2"] {
        for path in ["told", "file"] {
            let url = format!("https://orders:8443/{path}");
            let mut words = vec!["--cacert", &certificate];
            words.extend(case.split(' '));
            words.push(&url);
            seen.push(format!("{:?}", curl(pod, folder, &words)));
        }
    }
    // the certificate is not of an authority that this curl knows
    seen.push(curl(pod, folder, &["https://orders:8443/told"]).outcome);
    seen
}
