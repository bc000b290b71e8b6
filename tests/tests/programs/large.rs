//! A body of 1 GiB each way, by hash, and how much memory both sidecars took for it.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
    process::Stdio,
};

use weft_tests::{Need, Process, until};

use super::pair::{CURL, NGINX, Pair, ROOT, can_run, sha256};

const GIB: u64 = 1 << 30;
/// What a sidecar may take beyond what it had after a small request: its buffers and windows, and no body.
const EXTRA_KIB: u64 = 6 * 1024;

#[test]
fn one_gib_over_http1_takes_no_memory() {
    one_gib("listen 8080", "--http1.1");
}

#[test]
fn one_gib_over_http2_takes_no_memory() {
    one_gib("listen 8080 http2", "--http2-prior-knowledge");
}

fn one_gib(listen: &str, version: &str) {
    if !can_run(&[ROOT, CURL, NGINX, Need::Program("openssl", "openssl")]) {
        return;
    }
    let mut pair = Pair::direct(&["orders"]);
    let www = pair.folder("www");
    let file = www.join("large");
    write_sparse(&file);
    fs::write(www.join("small"), "small").unwrap();
    let _nginx = pair.start_nginx(
        &format!(
            "client_max_body_size 0; server {{ {listen}; root {}; location /put/ {{ dav_methods PUT; create_full_put_path on; }} }}",
            www.display()
        ),
        8080,
    );
    pair.weave(&[("orders", 8080)]);
    let (from, to) = (pair.from.as_ref().unwrap(), pair.to.as_ref().unwrap());
    let curl = format!("curl -sS -f -m 60 {version} http://orders:8080");
    pair.client.shell(&format!("{curl}/small; {curl}/put/small -T {}/small", www.display()));
    let before = [&from.process, &to.process].map(resident_kib);
    for process in [&from.process, &to.process] {
        forget_peak(process);
    }
    // The hash is taken of what curl prints, so that no second file is needed. One after the other, so that
    // both directions' peaks are seen.
    let mut download = pair.client.command("sh");
    download.args(["-c", &format!("{curl}/large | openssl dgst -sha256 -r")]);
    let download = download.stderr(Stdio::inherit()).output().unwrap();
    let downloaded = String::from_utf8_lossy(&download.stdout).into_owned();
    let status = pair
        .client
        .shell(&format!("{curl}/put/large -T {} -o /dev/null -w '%{{http_code}}'", file.display()));
    assert_eq!(status, "201");
    let expected = sha256(&file);
    assert_eq!(downloaded.split(' ').next(), Some(&*expected), "the download");
    let uploaded = www.join("put/large");
    until("nginx has put the upload in its place", || uploaded.exists());
    assert_eq!(fs::metadata(&uploaded).unwrap().len(), GIB);
    assert_eq!(sha256(&uploaded), expected, "the upload");
    for (name, process, before) in [("client", &from.process, before[0]), ("server", &to.process, before[1])]
    {
        let peak = status_kib(process, "VmHWM:");
        println!("{version}: the {name}'s sidecar had {before} KiB, and {peak} KiB at most");
        assert!(peak < before + EXTRA_KIB, "the {name}'s sidecar went from {before} KiB to {peak} KiB");
    }
    pair.assert_secured();
}

/// A file of 1 GiB that takes little room, with a mark in every MiB: a part that is lost, doubled or swapped
/// changes the hash.
fn write_sparse(path: &Path) {
    let file = File::create(path).unwrap();
    file.set_len(GIB).unwrap();
    for number in 0..1024_u64 {
        let mark = format!("mark {number}");
        file.write_at(mark.as_bytes(), (number << 20) + number * 37).unwrap();
    }
}

fn resident_kib(process: &Process) -> u64 {
    status_kib(process, "VmRSS:")
}

fn status_kib(process: &Process, key: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap();
    let line = status.lines().find(|line| line.starts_with(key)).expect("the key");
    line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).expect("a number of KiB")
}

/// proc(5): 5 sets the peak to what is resident now.
fn forget_peak(process: &Process) {
    fs::write(format!("/proc/{}/clear_refs", process.id()), "5").unwrap();
}
