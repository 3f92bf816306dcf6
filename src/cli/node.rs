//! `lunplug node`.

use std::path::Path;

use serde::Serialize;

use super::Screen;
use super::client::{connect, timed};
use super::failure::Failure;
use super::output::{self, Format, vm_name};
use crate::api::v1;

#[derive(Serialize)]
struct NodeView {
    name: String,
    version: String,
    kernel: String,
    boot_id: String,
    initiator_name: String,
    multipathd: bool,
    grants: Vec<String>,
    simulated: bool,
    only_vm: String,
    max_vms: u32,
    max_volumes_per_vm: u32,
    stuck_calls: u64,
    state_trouble: String,
    require_wwid: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    hbas: Vec<HbaView>,
}

#[derive(Serialize)]
struct HbaView {
    host: u32,
    wwpn: String,
    wwnn: String,
    state: String,
    speed: String,
    fabric: String,
    port_type: String,
}

impl From<v1::Hba> for HbaView {
    fn from(hba: v1::Hba) -> Self {
        let v1::Hba { host, wwpn, wwnn, state, speed, fabric, port_type } = hba;
        Self { host, wwpn, wwnn, state, speed, fabric, port_type }
    }
}

impl HbaView {
    /// For people, in one line.
    fn line(&self) -> String {
        let Self { host, wwpn, state, speed, fabric, .. } = self;
        let fabric = if fabric.is_empty() { String::new() } else { format!(", fabric {fabric}") };
        format!("{wwpn} (host{host}) {state}, {speed}{fabric}")
    }
}

impl From<v1::Node> for NodeView {
    fn from(node: v1::Node) -> Self {
        let limits = node.limits.unwrap_or_default();
        Self {
            name: node.name,
            version: node.version,
            kernel: node.kernel,
            boot_id: node.boot_id,
            initiator_name: node.initiator_name,
            multipathd: node.multipathd,
            grants: node.grants,
            simulated: node.simulated,
            only_vm: vm_name(node.only_vm.as_ref()),
            max_vms: limits.max_vms,
            max_volumes_per_vm: limits.max_volumes_per_vm,
            stuck_calls: node.stuck_calls,
            state_trouble: node.state_trouble,
            require_wwid: node.require_wwid,
            hbas: node.hbas.into_iter().map(HbaView::from).collect(),
        }
    }
}

pub(super) async fn run(
    socket: &Path,
    format: Format,
    screen: &mut Screen<'_>,
) -> Result<(), Failure> {
    let mut client = connect(socket).await?;
    let answer = client.get_node(timed(v1::GetNodeRequest {})).await?.into_inner();
    let node = NodeView::from(answer.node.unwrap_or_default());
    if format != Format::Table {
        return Ok(output::document(format, &node, screen.out)?);
    }
    let facts = [
        ("Node", node.name),
        ("lunplugd", node.version),
        ("Kernel", node.kernel),
        ("Boot", node.boot_id),
        ("Initiator", node.initiator_name),
        ("HBAs", node.hbas.iter().map(HbaView::line).collect::<Vec<_>>().join("; ")),
        ("multipathd", if node.multipathd { "running" } else { "not running" }.into()),
        ("Grants", node.grants.join(", ")),
        ("Host", if node.simulated { "simulated: nothing is real".into() } else { String::new() }),
        ("Serves only", node.only_vm),
        (
            "Stuck calls",
            if node.stuck_calls == 0 {
                String::new()
            } else {
                format!(
                    "{} into the kernel or libvirt; see dmesg, lunplug vm list",
                    node.stuck_calls
                )
            },
        ),
        ("State", node.state_trouble),
        ("VMs at most", node.max_vms.to_string()),
        ("Volumes a VM", node.max_volumes_per_vm.to_string()),
        (
            "Requires",
            if node.require_wwid { "--wwid of every volume".into() } else { String::new() },
        ),
    ];
    Ok(output::facts(&facts, screen.out)?)
}
