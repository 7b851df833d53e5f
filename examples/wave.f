c     wave: a plucked string, in Fortran, over libfpvm3.
c
c     usage: wave [points [steps [workers]]]
c
c     The string is cut into pieces; in every step each worker gives its
c     end points to its neighbours. The checksum is taken over the bits
c     of all points and does not depend on the number of workers; with 0
c     workers the master computes alone, without PVM.
c
c     pvmfspawn passes no arguments, so a task that PVM has spawned is a
c     worker and one that a shell has started is the master.
      program wave
      implicit none
      include 'fpvm3.h'
      integer n, steps, w, parent
      call number(1, 1000, n)
      call number(2, 500, steps)
      call number(3, 4, w)
      parent = PvmNoParent
      if (w .gt. 0) call pvmfparent(parent)
      if (parent .gt. 0) then
         call worker(parent)
      else
         call master(n, steps, w)
      end if
      end

      subroutine master(n, steps, w)
      implicit none
      include 'fpvm3.h'
      integer maxw
      parameter (maxw = 100)
      integer n, steps, w, tids(maxw), i, first, info, buf, got
      integer part(6)
      double precision, allocatable :: u(:)
      integer(8) hash
      character(len=1024) self
      if (w .gt. maxw .or. n .lt. 4 .or. n .lt. 2*w) then
         write (0, *) 'wave: up to 100 workers, 2 points for each'
         call exit(2)
      end if
      allocate (u(0:n+1))
      if (w .eq. 0) then
         call solve(u, 1, n, n, steps, 0, 0)
      else
         call path(self)
         call pvmfspawn(trim(self), PVMDEFAULT, '*', w, tids, got)
         if (got .lt. w) then
            write (0, *) 'wave: PVM spawned', got, ' of', w
            call pvmfexit(info)
            call exit(1)
         end if
         do i = 1, w
            part(1) = n
            part(2) = steps
            part(3) = first(i, n, w)
            part(4) = first(i + 1, n, w) - 1
            part(5) = 0
            if (i .gt. 1) part(5) = tids(i - 1)
            part(6) = 0
            if (i .lt. w) part(6) = tids(i + 1)
            call pvmfinitsend(PVMDEFAULT, buf)
            call pvmfpack(INTEGER4, part, 6, 1, info)
            call pvmfsend(tids(i), 1, info)
            call must(info, 'pvmfsend')
         end do
         do i = 1, w
            call pvmfrecv(tids(i), 2, buf)
            call must(buf, 'pvmfrecv')
            call pvmfunpack(REAL8, u(first(i, n, w)),
     &           first(i + 1, n, w) - first(i, n, w), 1, info)
            call must(info, 'pvmfunpack')
         end do
         call pvmfexit(info)
      end if
      hash = 0
      do i = 1, n
         hash = ieor(ishftc(hash, 7), transfer(u(i), hash))
      end do
      write (*, '(a,i0,a,i0,a,z16.16)') 'wave: ', n, ' points, ',
     &     steps, ' steps, checksum ', hash
      end

      subroutine worker(parent)
      implicit none
      include 'fpvm3.h'
      integer parent, buf, info, p(6)
      double precision, allocatable :: u(:)
      call pvmfrecv(parent, 1, buf)
      call must(buf, 'pvmfrecv')
      call pvmfunpack(INTEGER4, p, 6, 1, info)
      call must(info, 'pvmfunpack')
      allocate (u(p(3)-1:p(4)+1))
      call solve(u, p(3), p(4), p(1), p(2), p(5), p(6))
      call pvmfinitsend(PVMDEFAULT, buf)
      call pvmfpack(REAL8, u(p(3)), p(4) - p(3) + 1, 1, info)
      call pvmfsend(parent, 2, info)
      call must(info, 'pvmfsend')
      call pvmfexit(info)
      end

c     Points a to b of the n points of the string, of which the outermost
c     are held; left and right are the tids of the neighbours, or 0.
      subroutine solve(u, a, b, n, steps, left, right)
      implicit none
      include 'fpvm3.h'
      integer a, b, n, steps, left, right, i, s, info, buf
      integer tid, tag, len
      double precision u(a-1:b+1), was(a-1:b+1), next(a-1:b+1)
      do i = a - 1, b + 1
         u(i) = dble(min(max(i - 1, 0), 3*max(n - i, 0))) / n
         was(i) = u(i)
         next(i) = u(i)
      end do
      do s = 1, steps
         if (left .ne. 0) then
            call pvmfpsend(left, 3, u(a), 1, REAL8, info)
            call must(info, 'pvmfpsend')
         end if
         if (right .ne. 0) then
            call pvmfinitsend(PVMRAW, buf)
            call pvmfpack(REAL8, u(b), 1, 1, info)
            call pvmfsend(right, 4, info)
            call must(info, 'pvmfsend')
            call pvmfprecv(right, 3, u(b+1), 1, REAL8,
     &           tid, tag, len, info)
            call must(info, 'pvmfprecv')
         end if
         if (left .ne. 0) then
            call pvmfrecv(left, 4, buf)
            call must(buf, 'pvmfrecv')
            call pvmfunpack(REAL8, u(a-1), 1, 1, info)
            call must(info, 'pvmfunpack')
         end if
         do i = max(a, 2), min(b, n - 1)
            next(i) = 2*u(i) - was(i)
     &           + 0.25d0*(u(i-1) - 2*u(i) + u(i+1))
         end do
         do i = max(a, 2), min(b, n - 1)
            was(i) = u(i)
            u(i) = next(i)
         end do
      end do
      end

c     The first point of worker i of w.
      integer function first(i, n, w)
      implicit none
      integer i, n, w
      first = 1 + int(int(n, 8)*(i - 1) / w)
      end

c     The i-th argument as a number, or what stands for it.
      subroutine number(i, default, value)
      implicit none
      integer i, default, value, status
      character(len=32) arg
      value = default
      if (command_argument_count() .lt. i) return
      call get_command_argument(i, arg)
      read (arg, *, iostat=status) value
      if (status .ne. 0 .or. value .lt. 0) then
         write (0, *) 'usage: wave [points [steps [workers]]]'
         call exit(2)
      end if
      end

c     This program's own path, absolute unless PVM is to look for it.
      subroutine path(self)
      implicit none
      character*(*) self
      character(len=1024) cwd
      call get_command_argument(0, self)
      if (self(1:1) .ne. '/' .and. index(self, '/') .ne. 0) then
         call getcwd(cwd)
         self = trim(cwd) // '/' // self
      end if
      end

c     Ends the task when a PVM call has failed.
      subroutine must(info, call)
      implicit none
      integer info, status
      character*(*) call
      if (info .lt. 0) then
         call pvmfperror(call, status)
         call pvmfexit(status)
         call exit(1)
      end if
      end
