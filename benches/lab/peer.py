"""Attaches and detaches by os-brick as it is asked by lines of JSON; answers with the seconds it took.

Its privileged part runs in this process: no sudo, no second process, which is the fastest that os-brick can be.
"""
import concurrent.futures
import importlib.metadata
import json
import os
import sys
import time

import os_brick
from os_brick import privileged
from os_brick.initiator import connector
from oslo_concurrency import lockutils
from oslo_config import cfg

ANSWERS = os.fdopen(os.dup(1), "w")
# Whatever it prints is for people.
os.dup2(2, 1)


def answer(**values):
    print(json.dumps(values), file=ANSWERS, flush=True)


def properties(asked, lun):
    portals, iqn = asked["portals"], asked["iqn"]
    found = {"target_portal": portals[0], "target_iqn": iqn, "target_lun": lun, "target_discovered": False}
    if len(portals) > 1:
        found |= {
            "target_portals": portals,
            "target_iqns": [iqn] * len(portals),
            "target_luns": [lun] * len(portals),
        }
    return found


def main():
    cfg.CONF([], project="bench")
    lockutils.set_defaults("/run/os-brick")
    os_brick.setup(cfg.CONF)
    for context in (privileged.default, privileged.brick_privsep_hide_output):
        context.set_client_mode(False)
    attached = {}
    answer(version=importlib.metadata.version("os-brick"))
    for line in sys.stdin:
        asked = json.loads(line)
        several = len(asked["portals"]) > 1
        iscsi = connector.InitiatorConnector.factory(
            "ISCSI", "", use_multipath=several, enforce_multipath=several
        )

        def attach(lun):
            attached[lun] = iscsi.connect_volume(properties(asked, lun))

        def detach(lun):
            iscsi.disconnect_volume(properties(asked, lun), attached.pop(lun))

        work = {"attach": attach, "detach": detach}[asked["do"]]
        begin = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(len(asked["luns"])) as pool:
            list(pool.map(work, asked["luns"]))
        answer(seconds=time.monotonic() - begin)


main()
