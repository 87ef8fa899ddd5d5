"""edgetrain devices"""

from __future__ import annotations

import click

from edgetrain.cli import options


@click.command("devices")
@options.JSON
def command(as_json: bool) -> None:
    """List the devices of this machine.

    \b
    Example:
      edgetrain devices --json
    """
    from devices import available
    from edgetrain.units import format_bytes

    profiles = [profile.to_json() for profile in available()]

    def text() -> str:
        return "\n".join(
            f"{p['kind']:8} {p['name']}  device memory {format_bytes(p['device_memory_bytes'])}, host memory "
            f"{format_bytes(p['host_memory_bytes'])}, {p['num_cores']} cores"
            for p in profiles
        )

    options.emit({"devices": profiles}, as_json, text)
