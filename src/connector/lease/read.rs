//! What leases say. Read without their lock: what a change is decided by is read again under it.

use super::store::{entry_name, of_lun, users_dir};
use super::{Lease, Leases, Made, User, file_name, lease_file};
use crate::connector::error::{Error, chain};
use crate::types::{Lun, VolumeKey};

impl Leases {
    /// A target's own file; `None` where there is none of this boot.
    pub(crate) async fn lease<M: Made>(&self, target: &str) -> Result<Option<Lease<M>>, Error> {
        self.read_lease(&lease_file(M::TRANSPORT, target)).await
    }

    /// What was made at a target for all of its users.
    pub(crate) async fn made<M: Made>(&self, target: &str) -> Result<M, Error> {
        Ok(self.lease::<M>(target).await?.map(|lease| lease.made).unwrap_or_default())
    }

    /// What an owner has of a LUN.
    pub(crate) async fn user<M: Made>(
        &self,
        target: &str,
        owner: &VolumeKey,
        lun: Lun,
    ) -> Result<Option<User>, Error> {
        Ok(self.read_both::<M>(target, owner, lun).await?.1)
    }

    /// All that a volume has at a target: mostly one LUN.
    pub(crate) async fn users_of<M: Made>(
        &self,
        target: &str,
        owner: &VolumeKey,
    ) -> Result<Vec<User>, Error> {
        let end = format!(":{}", file_name(&owner.to_string()));
        self.users_that::<M>(target, |name| name.ends_with(&end), |u| u.owner == *owner).await
    }

    /// All users of a LUN.
    pub(crate) async fn users_with<M: Made>(
        &self,
        target: &str,
        lun: Lun,
    ) -> Result<Vec<User>, Error> {
        let start = of_lun(lun);
        self.users_that::<M>(target, |name| name.starts_with(&start), |u| u.lun == lun).await
    }

    /// What an owner has of a LUN, and the other users of it.
    pub(crate) async fn user_and_others<M: Made>(
        &self,
        target: &str,
        owner: &VolumeKey,
        lun: Lun,
    ) -> Result<(Option<User>, Vec<User>), Error> {
        let (lease, mine) = self.read_both::<M>(target, owner, lun).await?;
        let others = match lease.and_then(|lease| lease.users) {
            Some(users) => {
                let is = |u: &User| u.lun == lun && u.owner != *owner;
                users.into_iter().filter(is).collect()
            }
            None => self.others_filed::<M>(target, owner, lun).await?,
        };
        Ok((mine, others))
    }

    /// The other users of a LUN of a target whose users have files.
    pub(super) async fn others_filed<M: Made>(
        &self,
        target: &str,
        owner: &VolumeKey,
        lun: Lun,
    ) -> Result<Vec<User>, Error> {
        let (start, mine) = (of_lun(lun), entry_name(owner, lun));
        let named = |name: &str| name.starts_with(&start) && name != mine;
        let is = |u: &User| u.lun == lun && u.owner != *owner;
        self.filed_that::<M>(target, named, is).await
    }

    /// The users whose files are `named` so, if they are what the name says (`is`).
    async fn users_that<M: Made>(
        &self,
        target: &str,
        named: impl Fn(&str) -> bool + Send,
        is: impl Fn(&User) -> bool + Send,
    ) -> Result<Vec<User>, Error> {
        match self.lease::<M>(target).await?.and_then(|lease| lease.users) {
            Some(users) => Ok(users.into_iter().filter(is).collect()),
            None => self.filed_that::<M>(target, named, is).await,
        }
    }

    /// The same at a target whose users have files.
    async fn filed_that<M: Made>(
        &self,
        target: &str,
        named: impl Fn(&str) -> bool + Send,
        is: impl Fn(&User) -> bool + Send,
    ) -> Result<Vec<User>, Error> {
        let dir = users_dir(M::TRANSPORT, target);
        let mut found = Vec::new();
        for name in self.names(&dir).await?.iter().filter(|name| named(name)) {
            found.extend(self.read_user(&format!("{dir}/{name}")).await?.filter(&is));
        }
        Ok(found)
    }

    /// Those of `routes` by which nobody wants to come to the target. Where somebody's file cannot be read,
    /// nobody can say so of any.
    pub(crate) async fn unwanted<M: Made, R: ToString + Send>(
        &self,
        target: &str,
        routes: Vec<R>,
    ) -> Result<Vec<R>, Error> {
        Ok(self.made_and_unwanted::<M, R>(target, |_| routes).await?.1)
    }

    /// The same of routes that depend on what was made at the target; and that.
    pub(crate) async fn made_and_unwanted<M: Made, R: ToString + Send>(
        &self,
        target: &str,
        routes: impl FnOnce(&M) -> Vec<R> + Send,
    ) -> Result<(M, Vec<R>), Error> {
        let lease = self.lease::<M>(target).await?;
        let (made, users) = lease.map(|lease| (lease.made, lease.users)).unwrap_or_default();
        let mut routes: Vec<(String, R)> =
            routes(&made).into_iter().map(|route| (route.to_string(), route)).collect();
        let mut strike = |user: &User| {
            routes.retain(|(route, _)| !user.routes.contains(route));
            routes.is_empty()
        };
        match users {
            Some(users) => drop(users.iter().any(&mut strike)),
            None => {
                let dir = users_dir(M::TRANSPORT, target);
                for name in self.names(&dir).await? {
                    match self.read_user(&format!("{dir}/{name}")).await {
                        // Mostly the first has them all.
                        Ok(Some(user)) if strike(&user) => break,
                        Ok(_) => {}
                        Err(error) => {
                            tell(&error);
                            return Ok((made, Vec::new()));
                        }
                    }
                }
            }
        }
        Ok((made, routes.into_iter().map(|(_, route)| route).collect()))
    }

    /// The own files of all targets of this boot that can be read. One that cannot is told and left: it is its
    /// target's trouble alone.
    pub(crate) async fn all<M: Made>(&self) -> Result<Vec<Lease<M>>, Error> {
        let dir = format!("leases/{}", M::TRANSPORT);
        let mut all = Vec::new();
        for name in self.names(&dir).await? {
            match self.read_lease(&format!("{dir}/{name}")).await {
                Ok(lease) => all.extend(lease),
                Err(error) => tell(&error),
            }
        }
        Ok(all)
    }

    /// Who has something at any target, as far as that can be read.
    pub(crate) async fn owners<M: Made>(&self) -> Result<Vec<VolumeKey>, Error> {
        let mut owners = Vec::new();
        for lease in self.all::<M>().await? {
            if let Some(users) = lease.users {
                owners.extend(users.into_iter().map(|user| user.owner));
                continue;
            }
            let dir = users_dir(M::TRANSPORT, &lease.target);
            for name in self.names(&dir).await? {
                match self.read_user(&format!("{dir}/{name}")).await {
                    Ok(user) => owners.extend(user.map(|user| user.owner)),
                    Err(error) => tell(&error),
                }
            }
        }
        Ok(owners)
    }
}

fn tell(error: &Error) {
    tracing::error!(why = chain(error), "see docs/operations.md, damaged records");
}
