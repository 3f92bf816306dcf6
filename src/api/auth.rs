//! Who may call: the peer's uid, as the kernel says it (SO_PEERCRED), against the allowed ones.

use std::collections::BTreeSet;

use tonic::transport::server::UdsConnectInfo;
use tonic::{Request, Status};

use super::status::{self, About};
use crate::reason::Reason;
use crate::vm::facade::Refusal;

/// The uids that may call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllowedPeers(BTreeSet<u32>);

impl AllowedPeers {
    /// The configured uids, root, and the daemon's own.
    pub fn new(configured: impl IntoIterator<Item = u32>, own: u32) -> Self {
        Self(configured.into_iter().chain([0, own]).collect())
    }

    /// These and nobody else, not even root.
    pub fn exactly(uids: impl IntoIterator<Item = u32>) -> Self {
        Self(uids.into_iter().collect())
    }

    /// Whether a peer may call. A peer whose uid is not known may not.
    pub fn check(&self, uid: Option<u32>) -> Result<(), Refusal> {
        match uid {
            Some(uid) if self.0.contains(&uid) => Ok(()),
            Some(uid) => Err(Refusal::new(
                Reason::PeerNotAllowed,
                format!("uid {uid} may not use this lunplugd"),
            )),
            None => Err(Refusal::new(
                Reason::PeerNotAllowed,
                "the caller's uid is not known: connect by the unix socket",
            )),
        }
    }

    /// The same as an interceptor for every call, health and reflection included.
    pub fn interceptor(
        self,
    ) -> impl FnMut(Request<()>) -> Result<Request<()>, Status> + Clone + Send + 'static {
        move |request| {
            let credentials =
                request.extensions().get::<UdsConnectInfo>().and_then(|info| info.peer_cred);
            match self.check(credentials.map(|c| c.uid())) {
                Ok(()) => Ok(request),
                Err(refusal) => {
                    tracing::warn!(pid = credentials.and_then(|c| c.pid()), "refused: {refusal}");
                    Err(status::status(&refusal, &About::default()))
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configured_root_and_oneself_may_and_nobody_else() {
        let peers = AllowedPeers::new([107], 1000);
        for uid in [0, 107, 1000] {
            assert_eq!(peers.check(Some(uid)), Ok(()));
        }
        for uid in [Some(1), Some(65534), None] {
            assert_eq!(peers.check(uid).unwrap_err().reason, Reason::PeerNotAllowed);
        }
    }
}
