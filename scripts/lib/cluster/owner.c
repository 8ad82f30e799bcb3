/*
 * Makes sshfs a file system for many users.
 *
 * sshfs talks to its server as one user, here root, and so whatever it creates belongs to root. Loaded into sshfs with
 * LD_PRELOAD, this stands in for libfuse's fuse_new() and has each file, folder and node that was created given to the
 * user whose process asked for it (or the group of a set-group-id folder), as any shared file system does. Symbolic links
 * stay root's: SFTP's way to change an owner follows them.
 */
#define _GNU_SOURCE
#define FUSE_USE_VERSION 31
#define _FILE_OFFSET_BITS 64
#include <dlfcn.h>
#include <fuse.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#undef fuse_new

static struct fuse_operations real;

static int give(const char *path, int result)
{
	if (result < 0)
		return result;
	const struct fuse_context *context = fuse_get_context();
	gid_t gid = context->gid;
	char *folder = strdup(path);
	char *slash = folder ? strrchr(folder, '/') : NULL;
	struct stat st;
	if (slash) {
		slash[slash == folder ? 1 : 0] = '\0';
		if (real.getattr(folder, &st, NULL) == 0 && (st.st_mode & S_ISGID))
			gid = st.st_gid;
	}
	free(folder);
	if (context->uid == 0 && gid == 0)
		return result;
	int failed = real.chown(path, context->uid, gid, NULL);
	return failed < 0 ? failed : result;
}

static int give_create(const char *path, mode_t mode, struct fuse_file_info *fi)
{
	return give(path, real.create(path, mode, fi));
}

static int give_mkdir(const char *path, mode_t mode) { return give(path, real.mkdir(path, mode)); }

static int give_mknod(const char *path, mode_t mode, dev_t dev) { return give(path, real.mknod(path, mode, dev)); }

struct fuse *fuse_new(struct fuse_args *args, const struct fuse_operations *op, size_t op_size, void *data)
{
	struct fuse *(*next)(struct fuse_args *, const struct fuse_operations *, size_t, void *) =
		(struct fuse *(*)(struct fuse_args *, const struct fuse_operations *, size_t, void *))dlsym(RTLD_NEXT,
													     "fuse_new");
	struct fuse_operations ours = { 0 };
	memcpy(&ours, op, op_size < sizeof(ours) ? op_size : sizeof(ours));
	real = ours;
	ours.create = real.create ? give_create : NULL;
	ours.mkdir = give_mkdir;
	ours.mknod = give_mknod;
	return next(args, &ours, sizeof(ours), data);
}
