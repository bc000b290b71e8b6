# shellcheck shell=sh
# Where the package `consul` comes from, for the demo and the tests; sourced by a script that has a function `say`.

# Debian had Consul last in its suite `bullseye`. That suite is added for this one package, from the mirror and with
# the keys of the machine's own sources; where the machine's own suites have it, nothing is added.
offer_consul() {
    if apt-cache policy consul | grep -q 'Candidate: [0-9]'; then return 0; fi
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' | grep -v security | head -1)
    if [ -z "$mirror" ]; then
        say "this is no Debian, and its suites have no consul; install it from https://developer.hashicorp.com/consul"
        return 0
    fi
    printf 'Types: deb\nURIs: %s\nSuites: bullseye\nComponents: main\nSigned-By: %s\n' "${mirror%/}" \
        /usr/share/keyrings/debian-archive-keyring.gpg >/etc/apt/sources.list.d/weft-consul.sources
    printf 'Package: *\nPin: release n=bullseye\nPin-Priority: -1\n\nPackage: consul\nPin: release n=bullseye\nPin-Priority: 500\n' \
        >/etc/apt/preferences.d/weft-consul
    apt-get update -qq || say "apt-get update failed; is there a suite bullseye at $mirror?"
}
