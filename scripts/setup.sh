# shellcheck shell=bash
# Functions of demo.sh and test.sh: programs from Debian packages where we may install them, and a virtual environment on any Debian
# or Ubuntu with Python.

PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
say()  { printf '\n== %s\n' "$*"; }
loud() { printf '\n******** %s\n' "$*" >&2; }

as_root() {  # run a command as root, or fail at once
    if [ "$(id -u)" = 0 ]; then env "$@"; else command -v sudo >/dev/null && sudo -n env "$@"; fi
}

absent() {  # those of these Debian packages that are not here; PACKAGE/COMMAND is satisfied by the command, wherever it is from
    local p
    for p in "$@"; do
        case $p in */*) command -v "${p#*/}" >/dev/null && continue;; esac
        dpkg-query -W -f '${Status}\n' "${p%/*}" 2>/dev/null | grep -q 'ok installed' || echo "${p%/*}"
    done
}

packages() {  # see to it that these Debian packages are here, as for `absent`; fails where that is not so in the end, and says which
    local need policy=/usr/sbin/policy-rc.d made=
    mapfile -t need < <(absent "$@")
    [ ${#need[@]} -gt 0 ] || return 0
    if command -v apt-get >/dev/null && as_root true 2>/dev/null; then
        say "Installing Debian packages: ${need[*]}"
        # programs are needed, not services: nothing that comes with them is started now, and no SSH server is left enabled
        if [ ! -e $policy ]; then made=1; as_root sh -c "printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy"; fi
        as_root apt-get -qq update || true
        as_root DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 install --no-install-recommends "${need[@]}" \
            </dev/null >/dev/null || true
        [ -z "$made" ] || as_root rm -f $policy
        case " ${need[*]} " in *" openssh-server "*) as_root systemctl -q disable ssh.service ssh.socket >/dev/null 2>&1 || true;; esac
        mapfile -t need < <(absent "$@")
        [ ${#need[@]} -gt 0 ] || return 0
    fi
    loud "Missing: ${need[*]}. As root:  apt-get install ${need[*]}"; return 1
}

find_python() {  # set PYTHON to a Python that settings.ini allows: the one it names, or the first of the usual ones
    local min p
    min=$(sed -n 's/^min_python *= *//p' settings.ini)
    for p in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python3.10}; do
        "$p" -c "import sys; sys.exit(sys.version_info[:2] < tuple(map(int, '$min'.split('.'))))" 2>/dev/null && { PYTHON=$p; return; }
    done
    loud "No Python $min or newer found. Name one: PYTHON=/path/to/python3 bash $0"; return 1
}

venv() {  # venv DIRECTORY: a working virtual environment; an externally managed Python and a missing python3-venv are no obstacle
    local package
    "$1/bin/python" -m pip --version >/dev/null 2>&1 && return
    find_python || return
    rm -rf "$1"; "$PYTHON" -m venv "$1" >/dev/null 2>&1 && return
    package=$("$PYTHON" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    rm -rf "$1"; packages "$package" && "$PYTHON" -m venv "$1" && return
    # without that package a pip of the system (python3-pip) can still fill an environment
    rm -rf "$1"; "$PYTHON" -m pip --version >/dev/null 2>&1 && "$PYTHON" -m venv --without-pip "$1" &&
        "$PYTHON" -m pip --python "$1/bin/python" install --quiet pip && return
    loud "$PYTHON cannot make a virtual environment without the Debian package $package"; return 1
}
