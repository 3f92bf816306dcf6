//! iSCSI as a transport: portals are its routes, sessions its ways.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;

use super::login::{Logins, Made, Progress};
use super::session::{self, Session};
use super::verdict::LoginError;
use super::{Access, Inner, Job};
use crate::connector::error::Error;
use crate::connector::lun::{Transport, Way};
use crate::connector::scsi::Hctl;
use crate::connector::{AttachRequest, Authentication, Discovered};
use crate::spec::{IscsiSource, IscsiTarget, Source};
use crate::types::{Chap, Iface, Nexus, Portal};

/// Sessions by open-iscsi.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Iscsi;

/// By what a job's sessions are made.
#[derive(Debug, Clone)]
pub(crate) struct Initiator {
    /// Its credentials.
    pub(super) chap: Option<Chap>,
    /// What makes the sessions' iface record.
    pub(super) iface: Iface,
}

impl Way<Iscsi> for Session {
    fn route(&self) -> Portal {
        self.portal
    }

    fn hctl(&self, lun: u64) -> Hctl {
        Session::hctl(self, lun)
    }

    fn device_dir(&self, hctl: Hctl) -> String {
        Session::device_dir(self, hctl)
    }

    fn is_up(&self) -> bool {
        self.up
    }
}

#[async_trait]
impl Transport for Iscsi {
    type Source = IscsiSource;
    type Target = Nexus;
    type Route = Portal;
    type Way = Session;
    type With = Initiator;
    type Begun = Progress;
    type Refused = LoginError;
    type Made = Made;
    type State = Logins;

    fn source(source: &Source) -> Option<&IscsiSource> {
        source.as_iscsi()
    }

    fn targets(source: &IscsiSource) -> Vec<Access> {
        let iface = source.iface.record();
        let access = |target: IscsiTarget| Access {
            target: Nexus::new(target.target, iface.clone()),
            routes: target.portals,
            lun: target.lun,
        };
        source.targets().into_iter().map(access).collect()
    }

    /// By whatever iface: it is the same LUN.
    fn lock_name(target: &Nexus) -> &str {
        target.target().as_str()
    }

    fn with(request: &AttachRequest, source: &IscsiSource) -> Result<Initiator, Error> {
        let chap = match &request.authentication {
            Authentication::None => None,
            Authentication::Chap(chap) => Some(chap.clone()),
            Authentication::Lost(why) => return Err(Error::SecretUnavailable(why.clone())),
        };
        Ok(Initiator { chap, iface: source.iface.clone() })
    }

    /// Each portal is one.
    async fn routes(
        _: &Inner,
        _: &IscsiSource,
        targets: Vec<Access>,
    ) -> Result<Vec<Access>, Error> {
        Ok(targets)
    }

    async fn ways(luns: &Inner, job: &Job) -> Result<Vec<Session>, Error> {
        let target = &job.source.target;
        let mut sessions = session::of_target(&*luns.doors.sysfs, target.target()).await?;
        sessions.retain(|session| session.is_by(target));
        Ok(sessions)
    }

    async fn reach(
        luns: &Arc<Inner>,
        job: &Job,
        portals: &[Portal],
    ) -> Result<HashMap<Portal, Progress>, Error> {
        luns.log_in(job, portals).await
    }

    async fn await_way(
        luns: &Arc<Inner>,
        job: &Job,
        portal: Portal,
        begun: Option<Progress>,
    ) -> Result<Session, LoginError> {
        luns.await_session(&job.source.target, portal, begun).await
    }

    async fn unreached(luns: &Inner, parts: &[Job], refused: Vec<(usize, LoginError)>) -> Error {
        let portal = parts[0].source.routes[0];
        let worst = refused.into_iter().max_by_key(|(_, error)| error.weight());
        let (part, error) = worst.unwrap_or((0, LoginError::TimedOut { portal }));
        let job = &parts[part];
        let source = luns.diagnose(job, error).await;
        Error::NoSession { target: job.source.target.to_string(), source }
    }

    async fn admit(luns: &Inner, job: &Job, session: &Session) -> Result<(), Error> {
        luns.refuse_other_chap(job, session).await
    }

    /// A session of ours scans nothing by itself.
    fn is_ours(made: &Made, target: &Nexus, session: &Session) -> bool {
        made.has(target, session)
    }

    async fn settle(luns: &Inner, target: &Nexus, portals: &[Portal]) -> Result<bool, Error> {
        luns.settle(target, portals).await
    }

    async fn leave(luns: &Inner, at: &Access) -> Result<bool, Error> {
        luns.leave(at).await
    }

    async fn discover(
        luns: &Arc<Inner>,
        portal: Portal,
        authentication: Authentication,
    ) -> Result<Vec<Discovered>, Error> {
        luns.discover_at(portal, authentication).await
    }
}

impl Inner {
    /// Some targets (LIO) answer a login to an unknown name like one to a service that is down, so
    /// that iscsid tries until its time is over. The portal itself knows better.
    /// And iscsid itself ends a login with credentials, as one at an unknown target, when the target
    /// did not go through with it: it asked for none, or could not prove itself.
    async fn diagnose(&self, job: &Job, error: LoginError) -> LoginError {
        let portal = match error {
            LoginError::Unreachable { portal, .. } => portal,
            LoginError::NotFound { portal, .. } if job.with.chap.is_some() => portal,
            other => return other,
        };
        let mutual = job.with.chap.as_ref().is_some_and(Chap::is_mutual);
        match (self.iscsiadm(&job.source.target).is_exported(portal).await, error) {
            (Some(false), _) => {
                let detail = "it answers, but does not list it among its targets".into();
                LoginError::NotFound { portal, detail }
            }
            (Some(true) | None, LoginError::NotFound { portal, detail }) if mutual => {
                LoginError::Unproven { portal, detail }
            }
            (Some(true) | None, LoginError::NotFound { portal, detail }) => {
                LoginError::Unasked { portal, detail }
            }
            (Some(true) | None, error) => error,
        }
    }
}
