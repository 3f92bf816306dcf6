//! What leases and claims say, for whoever only looks at them.

use super::fc::Made as FcMade;
use super::iscsi::Made as IscsiMade;
use super::lease::{Claim, Claims, Entry, Lease, Made, User, file_name, lease_file, user_file};
use super::local::{LocalLease, LocalUser, TRANSPORT as LOCAL};
use crate::types::{Lun, VolumeKey, Wwid};

/// A file of a target's lease: its own, or that of one user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseFacts {
    /// The name that such a file has below the run directory.
    pub file: String,
    /// The boot that it is of.
    pub boot_id: String,
    /// The target's name.
    pub target: String,
    /// Who uses it: of a target's own file, in the form of before.
    pub users: Vec<UserFacts>,
    /// The portals at which a record or a session is lunplug's: of a target's own file.
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

/// The name of a LUN's claims below the run directory.
pub fn claims_file(wwid: &Wwid) -> String {
    format!("claims/{}", file_name(wwid.as_str()))
}

/// Whether a file is of one user of a target.
pub fn is_users(name: &str) -> bool {
    name.split('/').count() > 3
}

/// Reads a file of a lease. Of a transport that is not known here: an error.
pub fn read_lease(name: &str, bytes: &[u8]) -> Result<LeaseFacts, String> {
    let of_user = is_users(name);
    match name.split('/').nth(1) {
        Some(IscsiMade::TRANSPORT) if of_user => entry_facts(IscsiMade::TRANSPORT, bytes),
        Some(FcMade::TRANSPORT) if of_user => entry_facts(FcMade::TRANSPORT, bytes),
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
    Ok(LeaseFacts {
        file: lease_file(M::TRANSPORT, &lease.target),
        boot_id: lease.boot_id,
        target: lease.target,
        users: lease.users.unwrap_or_default().into_iter().map(user_facts).collect(),
        portals: portals(&lease.made),
    })
}

fn entry_facts(transport: &str, bytes: &[u8]) -> Result<LeaseFacts, String> {
    let entry: Entry<User> = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    Ok(LeaseFacts {
        file: user_file(transport, &entry.target, &entry.user.owner, entry.user.lun),
        boot_id: entry.boot_id,
        target: entry.target,
        users: vec![user_facts(entry.user)],
        portals: Vec::new(),
    })
}

fn user_facts(user: User) -> UserFacts {
    UserFacts {
        owner: user.owner,
        lun: Some(user.lun),
        wwid: user.wwid,
        paths: user.paths.iter().map(|p| p.hctl.to_string()).collect(),
        map: user.map.map(|m| m.uuid),
        attached: user.attachment.is_some(),
    }
}

fn local_facts(bytes: &[u8]) -> Result<LeaseFacts, String> {
    let lease: LocalLease = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    let user = |u: LocalUser| UserFacts {
        owner: u.owner,
        lun: None,
        wwid: u.found.map(|found| found.wwid),
        paths: Vec::new(),
        map: None,
        attached: u.attachment.is_some(),
    };
    Ok(LeaseFacts {
        file: lease_file(LOCAL, &lease.source),
        boot_id: lease.boot_id,
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
