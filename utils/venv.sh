# Sourced by the shell scripts: makes .venv, installs a requirements file into it, activates it.

use_venv() { # REQUIREMENTS_FILE
    local stamp
    stamp=".venv/.installed-$(cat requirements*.txt | cksum | cut -d ' ' -f 1)-$(basename "$1")"
    if [ ! -f "$stamp" ]; then
        "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "error: Python 3.11 or newer is needed; name one with PYTHON=..." >&2
            return 1
        }
        [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv || {
            echo "error: cannot make .venv; on Debian: apt install python3-venv" >&2
            return 1
        }
        echo "installing $1 into .venv" >&2
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$1" || {
            echo "error: pip could not install $1; the lines above say why" >&2
            return 1
        }
        touch "$stamp"
    fi
    . .venv/bin/activate
}
