//! Fibre Channel: HBAs, and how long the loss of a port holds up I/O.

use super::{Finding, RemotePort, Survey};

const CHECK: &str = "fc";

/// `fast_io_fail_tmo` above this has a guest wait long for its other paths.
const SOON: u32 = 30;

pub(super) fn examine(survey: &Survey) -> Vec<Finding> {
    if survey.hbas.is_empty() {
        return vec![Finding::fine(CHECK, "there is no Fibre Channel HBA")];
    }
    let mut findings: Vec<Finding> = survey.hbas.iter().filter_map(down).collect();
    findings.extend(slow(&survey.remote_ports));
    if !["", "manual"].contains(&survey.scsi_scan.as_str()) {
        let what = format!(
            "the kernel scans ports that log in by itself (scsi_mod.scan={}): a guest's LUN that is mapped at a boot is looked into by the host before lunplug has said whose it is",
            survey.scsi_scan
        );
        let todo = "Boot with scsi_mod.scan=manual where the host itself has nothing on these arrays; otherwise have LVM's global_filter and multipath's blacklist leave guests' LUNs alone.";
        findings.push(Finding::warning(CHECK, what, todo));
    }
    // Shown in any case: it is what to look at when a path is lost.
    findings.push(Finding::fine(CHECK, told(survey)));
    findings
}

fn down((wwpn, state): &(String, String)) -> Option<Finding> {
    (state != "Online").then(|| {
        let what = format!("HBA {wwpn} is {state}: no path comes by it");
        Finding::warning(CHECK, what, "See its link, the switch's port and its zoning.")
    })
}

/// Ports whose loss has I/O wait until their devices are removed, or long.
fn slow(ports: &[RemotePort]) -> Option<Finding> {
    let is_slow = |p: &&RemotePort| p.fast_io_fail_tmo.parse().is_ok_and(|s: u32| s > SOON);
    let slow: Vec<String> = ports
        .iter()
        .filter(|p| p.fast_io_fail_tmo == "off" || is_slow(p))
        .map(|p| format!("{} ({}) {}", p.wwpn, p.name, timeouts(p)))
        .collect();
    (!slow.is_empty()).then(|| {
        let what = format!(
            "when one of these ports is lost, I/O waits before it is tried by another path: {}",
            slow.join("; ")
        );
        let todo = "Set fast_io_fail_tmo 5 in the section defaults of multipath.conf (multipathd writes it to the ports of its paths), and reconfigure.";
        Finding::warning(CHECK, what, todo)
    })
}

fn timeouts(port: &RemotePort) -> String {
    format!("dev_loss_tmo {}, fast_io_fail_tmo {}", port.dev_loss_tmo, port.fast_io_fail_tmo)
}

fn told(survey: &Survey) -> String {
    let hbas = survey.hbas.iter().map(|(wwpn, state)| format!("HBA {wwpn} {state}"));
    let ports = survey
        .remote_ports
        .iter()
        .map(|p| format!("port {} ({}) {}, {}", p.wwpn, p.name, p.state, timeouts(p)));
    hbas.chain(ports).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::super::tests::healthy;
    use super::super::{Severity, examine};
    use super::*;

    fn port(fast_io_fail_tmo: &str) -> RemotePort {
        RemotePort {
            name: "rport-6:0-1".into(),
            wwpn: "0x500a0982991b8dc5".into(),
            state: "Online".into(),
            dev_loss_tmo: "600".into(),
            fast_io_fail_tmo: fast_io_fail_tmo.into(),
        }
    }

    fn found(survey: &Survey) -> Vec<(Severity, String)> {
        let all = examine(survey).into_iter().filter(|f| f.check == CHECK);
        all.map(|f| (f.severity, f.what)).collect()
    }

    #[test]
    fn timeouts_are_shown_and_those_that_hold_up_io_are_warned_of() {
        let node = |tmo: &str| Survey {
            hbas: vec![("0x21000024ff3d2e5c".into(), "Online".into())],
            remote_ports: vec![port(tmo)],
            scsi_scan: "manual".into(),
            ..healthy()
        };
        let fine = found(&node("5"));
        assert_eq!((fine.len(), fine[0].0), (1, Severity::Fine));
        assert!(fine[0].1.contains("dev_loss_tmo 600, fast_io_fail_tmo 5"), "{fine:?}");
        for tmo in ["off", "120"] {
            let slow = found(&node(tmo));
            assert_eq!((slow.len(), slow[0].0), (2, Severity::Warning));
            assert!(slow[0].1.contains("rport-6:0-1"), "{slow:?}");
        }
    }

    #[test]
    fn a_link_that_is_down_and_a_kernel_that_scans_are_warned_of() {
        let survey = Survey {
            hbas: vec![("0x21000024ff3d2e5c".into(), "Linkdown".into())],
            scsi_scan: "async".into(),
            ..healthy()
        };
        let found = found(&survey);
        assert_eq!(found.iter().filter(|(s, _)| *s == Severity::Warning).count(), 2);
        assert!(found[0].1.contains("Linkdown") && found[1].1.contains("scsi_mod.scan=async"));
    }
}
