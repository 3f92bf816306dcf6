//! What leases and claims say, for whoever only looks at them.

use super::fc::Made as FcMade;
use super::iscsi::Made as IscsiMade;
use super::lease::{Claim, Claims, Lease, Made, file_name};
use super::local::{LocalLease, TRANSPORT as LOCAL};
use crate::types::{Lun, VolumeKey, Wwid};

/// A target's lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseFacts {
    /// The boot that it is of.
    pub boot_id: String,
    /// Its transport's name.
    pub transport: &'static str,
    /// The target's name.
    pub target: String,
    /// Who uses it.
    pub users: Vec<UserFacts>,
    /// The portals at which a record or a session is lunplug's.
    pub portals: Vec<String>,
}

/// One volume in a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserFacts {
    /// Whose it is.
    pub owner: VolumeKey,
    /// Which LUN; `None` of what is on the host.
    pub lun: Option<Lun>,
    /// The LUN's identity, once proven.
    pub wwid: Option<Wwid>,
    /// The addresses of its paths.
    pub paths: Vec<String>,
    /// device-mapper's uuid of its map.
    pub map: Option<String>,
    /// It was handed out whole.
    pub attached: bool,
}

/// One claim on a LUN.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimFacts {
    /// Whose it is.
    pub owner: VolumeKey,
    /// The target whose lease knows of it.
    pub target: String,
    /// Others may have the LUN too.
    pub shareable: bool,
}

impl LeaseFacts {
    /// The name that the lease has below the run directory.
    pub fn file(&self) -> String {
        format!("leases/{}/{}", self.transport, file_name(&self.target))
    }
}

/// The name of a LUN's claims below the run directory.
pub fn claims_file(wwid: &Wwid) -> String {
    format!("claims/{}", file_name(wwid.as_str()))
}

/// Reads a lease. Of a transport that is not known here: an error.
pub fn read_lease(name: &str, bytes: &[u8]) -> Result<LeaseFacts, String> {
    match name.split('/').nth(1) {
        Some(IscsiMade::TRANSPORT) => lease_facts::<IscsiMade>(bytes, |made| {
            made.portals().iter().map(ToString::to_string).collect()
        }),
        // Nothing is made of a port that logs in by itself.
        Some(FcMade::TRANSPORT) => lease_facts::<FcMade>(bytes, |_| Vec::new()),
        Some(LOCAL) => local_facts(bytes),
        _ => Err("it is of a transport that this version does not know".into()),
    }
}

fn lease_facts<M: Made>(
    bytes: &[u8],
    portals: impl Fn(&M) -> Vec<String>,
) -> Result<LeaseFacts, String> {
    let lease: Lease<M> = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    let user = |u: super::lease::User| UserFacts {
        owner: u.owner,
        lun: Some(u.lun),
        wwid: u.wwid,
        paths: u.paths.iter().map(|p| p.hctl.to_string()).collect(),
        map: u.map.map(|m| m.uuid),
        attached: u.attachment.is_some(),
    };
    Ok(LeaseFacts {
        boot_id: lease.boot_id().to_owned(),
        transport: M::TRANSPORT,
        target: lease.target,
        users: lease.users.into_iter().map(user).collect(),
        portals: portals(&lease.made),
    })
}

fn local_facts(bytes: &[u8]) -> Result<LeaseFacts, String> {
    let lease: LocalLease = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    let user = |u: super::local::LocalUser| UserFacts {
        owner: u.owner,
        lun: None,
        wwid: u.found.map(|found| found.wwid),
        paths: Vec::new(),
        map: None,
        attached: u.attachment.is_some(),
    };
    Ok(LeaseFacts {
        boot_id: lease.boot_id,
        transport: LOCAL,
        target: lease.source,
        users: lease.users.into_iter().map(user).collect(),
        portals: Vec::new(),
    })
}

/// Reads the claims on a LUN, and the boot that they are of.
pub fn read_claims(bytes: &[u8]) -> Result<(String, Vec<ClaimFacts>), String> {
    let claims: Claims = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    let claim = |c: Claim| ClaimFacts { owner: c.owner, target: c.target, shareable: c.shareable };
    Ok((claims.boot_id, claims.claims.into_iter().map(claim).collect()))
}
