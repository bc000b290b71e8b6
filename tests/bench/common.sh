# Shared by the commands of this folder (sourced by sh): packages of the distribution, and cargo as the user who asked.

say() { printf '%s\n' "bench: $*" >&2; }
stop() { printf '%s\n' "bench: $*" >&2; exit 2; }

# What is missing of `needed` (words program:package), and what `more_missing_packages` of the caller adds.
missing_packages() {
    for pair in $needed; do
        command -v "${pair%%:*}" >/dev/null || printf '%s ' "${pair#*:}"
    done
    more_missing_packages
}

# Debian starts what it installs. Nobody asked for a web server on this machine.
policy=/usr/sbin/policy-rc.d
install_packages() {
    own_policy=
    if ! [ -e "$policy" ]; then
        own_policy=1
        trap 'rm -f "$policy"' EXIT
        trap 'exit 130' INT
        trap 'exit 143' TERM
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
    fi
    export DEBIAN_FRONTEND=noninteractive
    # shellcheck disable=SC2086 # words
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends $1; } >/dev/null ||
        stop "apt-get could not install: $1"
    if [ -n "$own_policy" ]; then
        rm -f "$policy"
        trap - EXIT INT TERM
    fi
    case " $1 " in *" nginx-light "*)
        if [ -d /run/systemd/system ]; then systemctl disable --now nginx >/dev/null 2>&1 || true; fi ;;
    esac
}

install_what_is_missing() {
    packages=$(missing_packages)
    if [ -n "$packages" ]; then
        command -v apt-get >/dev/null || stop "missing, and this is no Debian or Ubuntu. Install: $packages"
        say "installing from the distribution, without starting their services: $packages"
        install_packages "$packages"
        packages=$(missing_packages)
        [ -z "$packages" ] || stop "still missing after the installation: $packages"
    fi
    python3 -c 'import tomllib' 2>/dev/null || stop "Python 3.11 or newer is needed; this is $(python3 --version)"
}

# Under sudo the build belongs to the user who asked, whose cargo it is.
as_user() {
    if [ -n "${SUDO_USER:-}" ] && [ "$SUDO_USER" != root ]; then
        runuser -u "$SUDO_USER" -- env -u SUDO_USER PATH="$(getent passwd "$SUDO_USER" | cut -d: -f6)/.cargo/bin:$PATH" "$@"
    else
        env PATH="${HOME:-/root}/.cargo/bin:$PATH" "$@"
    fi
}
