# shellcheck shell=bash disable=SC2034
# What every script here needs: messages, refusal, and the packages the real
# PVM comes in. To be sourced.

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { say "$@"; exit 1; }

need_root() {
    [ "$(id -u)" = 0 ] || die "needs root (namespaces, apt): run it with sudo"
}

# PVM itself, its examples and NetPIPE for it, a Fortran compiler for libfpvm3.
PVM_PACKAGES=(pvm pvm-dev pvm-examples netpipe-pvm gcc libc6-dev make gfortran)
# What the test hosts are made of.
HOST_PACKAGES=(iproute2 util-linux openssh-server openssh-client passwd)

# need_packages NAME...: installs those Debian packages that are missing.
need_packages() {
    local package missing=()
    command -v dpkg-query >/dev/null ||
        die "this is no Debian: please install what stands for: $*"
    for package; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] ||
            missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    need_root
    say "installing ${missing[*]}"
    # RUNLEVEL=1 keeps a fresh sshd from being started on the machine itself.
    local apt=(env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 LC_ALL=C
        apt-get -qq -o DPkg::Lock::Timeout=600)
    "${apt[@]}" install -y --no-install-recommends "${missing[@]}" >/dev/null 2>&1 ||
        { "${apt[@]}" update >&2 &&
            "${apt[@]}" install -y --no-install-recommends "${missing[@]}" >&2; } ||
        die "apt could not install ${missing[*]}: see above"
}

# lay_out FILE DIR: mistctl FILE and the shim beside it in DIR as scripts/install does, for all test hosts.
lay_out() {
    local line
    need_packages libcap2-bin
    install -D -m 755 "$1" "$2/bin/mistctl"
    install -D -m 644 "$(dirname "$1")/libmistshim.so" "$2/lib/libmistshim.so"
    line=$(setpriv --reuid=65534 --regid=65534 --clear-groups "$2/bin/mistctl" check |
        sed -n 's/^ *sudo setcap \([^ ]*\) .*/\1/p')
    [ -z "$line" ] || setcap "$line" "$2/bin/mistctl"
}
