//! `lunplug libvirt-hook`: libvirt's qemu hook on a plain host.
//!
//! libvirt runs it with a domain's XML before it starts the domain, and does not start it where the hook fails.
//! A domain without disks of lunplug's is none of its business. The hook must not ask libvirt anything, for that
//! waits for it (<https://libvirt.org/hooks.html>); lunplugd knows so by the request's `domain`.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::Path;
use std::time::Duration;

use super::Screen;
use super::add::duration;
use super::client::{connect, timed, timed_for};
use super::failure::Failure;
use crate::api::convert::wire_vm_id;
use crate::api::v1;
use crate::domain::xml;
use crate::host::poddir::HOST_NODES;
use crate::reason::Reason;
use crate::types::VmId;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The domain's name. Its XML is read from stdin.
    domain: String,
    /// What libvirt is about to do; only `prepare` matters.
    operation: String,
    /// Where it is in that; only `begin` matters.
    sub_operation: String,
    /// More of it; not used.
    extra: Option<String>,
    /// Wait so long at most, e.g. 30s or 2m.
    #[arg(long, value_name = "TIME", default_value = "3m", value_parser = duration)]
    timeout: Duration,
}

/// What a domain's definition has of lunplug's: the VM whose the disks are, and their names.
#[derive(Debug, PartialEq, Eq)]
struct Defined {
    vm: VmId,
    disks: BTreeSet<String>,
}

pub(super) async fn run(args: Args, socket: &Path, screen: &mut Screen<'_>) -> Result<(), Failure> {
    let mut xml = String::new();
    // libvirt waits for it to be read, whatever the operation is.
    std::io::stdin().read_to_string(&mut xml)?;
    if (args.operation.as_str(), args.sub_operation.as_str()) != ("prepare", "begin") {
        return Ok(());
    }
    let Some(Defined { vm, disks }) = defined(&args.domain, &xml)? else { return Ok(()) };
    let id = wire_vm_id(&vm);
    let mut client = connect(socket).await?;
    let request =
        v1::PrepareStartRequest { vm: Some(id.clone()), within: None, domain: args.domain };
    let prepared = client.prepare_start(timed_for(args.timeout, request)).await?.into_inner();
    let request = v1::ListVolumesRequest { vm: Some(id) };
    let volumes = client.list_volumes(timed(request)).await?.into_inner().volumes;
    let names: BTreeMap<String, String> = volumes
        .into_iter()
        .filter_map(|volume| volume.spec)
        .map(|spec| (spec.disk_name, spec.name))
        .collect();
    for disk in &disks {
        let result = names
            .get(disk)
            .and_then(|volume| prepared.results.iter().find(|result| result.name == *volume));
        let Some(result) = result else {
            let message = format!("VM {vm} has no volume for disk {disk} of its definition");
            return Err(Failure::of(Reason::VolumeNotFound, message));
        };
        if let Some(error) = &result.error {
            return Err(Failure::refused(error));
        }
        writeln!(screen.err, "volume {} is ready for VM {vm}", result.name)?;
    }
    Ok(())
}

/// What is lunplug's in a definition; `None` where nothing is.
fn defined(domain: &str, xml: &str) -> Result<Option<Defined>, Failure> {
    // Whatever else a domain has that cannot be read is its own affair.
    if !xml.contains(HOST_NODES) {
        return Ok(None);
    }
    let refused = |why: String| {
        let message = format!("the definition of domain {domain} {why}");
        Failure::of(Reason::DomainXmlUnsupported, message)
    };
    let parsed = xml::parse(xml).map_err(|error| {
        let why = std::error::Error::source(&error).map(|why| format!(": {why}"));
        refused(format!("cannot be used: {error}{}", why.unwrap_or_default()))
    })?;
    let mut found: Option<Defined> = None;
    let sources = parsed.disks.iter().filter_map(|disk| disk.source.as_deref());
    for source in sources.filter_map(|source| Path::new(source).strip_prefix(HOST_NODES).ok()) {
        let parts: Vec<&str> = source.iter().filter_map(|part| part.to_str()).collect();
        let node = match parts.as_slice() {
            [dir, disk] => dir.split_once('_').and_then(|(namespace, name)| {
                Some((VmId::new(namespace, name).ok()?, (*disk).to_owned()))
            }),
            _ => None,
        };
        let Some((vm, disk)) = node else {
            let path = Path::new(HOST_NODES).join(source);
            let rule = format!("{HOST_NODES}/NAMESPACE_NAME/DISK");
            return Err(refused(format!("has a disk {}: it must be {rule}", path.display())));
        };
        match &mut found {
            None => found = Some(Defined { vm, disks: [disk].into() }),
            Some(known) if known.vm == vm => drop(known.disks.insert(disk)),
            Some(known) => {
                return Err(refused(format!("has disks of two VMs, {} and {vm}", known.vm)));
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::failure::Exit;

    fn domain(sources: &[&str]) -> String {
        let disk = |source: &&str| {
            format!(
                "<disk type='block' device='disk'><driver name='qemu' type='raw'/><source dev='{source}'/><target dev='sda' bus='scsi'/><address type='drive' controller='0' bus='0' target='0' unit='1'/></disk>"
            )
        };
        let disks: String = sources.iter().map(disk).collect();
        format!(
            "<domain type='kvm'><name>plain</name><os><type machine='q35'>hvm</type></os><devices>{disks}</devices></domain>"
        )
    }

    #[test]
    fn a_definition_says_whose_disks_it_has() {
        let ours = domain(&["/dev/sdz", "/dev/lunplug/ns_vm-1/a", "/dev/lunplug/ns_vm-1/b"]);
        let vm = VmId::new("ns", "vm-1").unwrap();
        let disks = ["a".to_owned(), "b".to_owned()].into();
        assert_eq!(defined("plain", &ours).unwrap(), Some(Defined { vm, disks }));
        for nothing in
            [domain(&["/dev/sdz"]), domain(&["/dev/lunplugs/ns_vm/a"]), "<nonsense".into()]
        {
            assert_eq!(defined("plain", &nothing).unwrap(), None, "{nothing}");
        }
    }

    #[test]
    fn what_cannot_be_told_keeps_the_domain_from_starting() {
        for (sources, why) in [
            (&["/dev/lunplug/vm/a"][..], "must be /dev/lunplug/NAMESPACE_NAME/DISK"),
            (&["/dev/lunplug/ns_vm/a/b"], "must be"),
            (&["/dev/lunplug/ns_vm/a", "/dev/lunplug/ns_other/a"], "two VMs, ns/vm and ns/other"),
        ] {
            let failure = defined("plain", &domain(sources)).unwrap_err();
            assert_eq!(failure.exit, Exit::Precondition);
            assert!(failure.message.contains(why), "{}", failure.message);
        }
        assert!(defined("plain", "<domain>/dev/lunplug/</dom").is_err());
    }
}
